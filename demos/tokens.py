"""Gates in language networks: which of two marked tokens comes first?

    python demos/tokens.py train
    python demos/tokens.py infer --checkpoint checkpoints/fsg_tokens.pth
    python demos/tokens.py train --network bert

Sequences of 16 tokens are drawn at random and hold the tokens 1 and 2 once each; the class says
whether 1 stands before 2. Networks: torch's TransformerEncoder, and BERT and GPT-2 built from a
configuration where Hugging Face's transformers is installed; two layers of width 64 each.
"""

import argparse

import common
import torch
from common import InputError, Split, util
from torch import nn

LENGTH, VOCABULARY, WIDTH = 16, 32, 64


def draw(n: int, generator: torch.Generator) -> Split:
    """n sequences with their classes."""
    x = torch.randint(3, VOCABULARY, (n, LENGTH), generator=generator)
    places = torch.rand(n, LENGTH, generator=generator).argsort(1)[:, :2]  # two different ones
    x.scatter_(1, places, torch.tensor([[1, 2]]).expand(n, 2))
    return Split(x, (places[:, 0] < places[:, 1]).long())


def load(args: argparse.Namespace) -> tuple[Split, Split, int]:
    """Training set, test set, number of classes."""
    generator = torch.Generator().manual_seed(args.seed)
    return draw(4000, generator), draw(1000, generator), 2


class Classifier(nn.Module):
    """Token and place embeddings, a torch encoder, and a linear layer on the mean token."""

    def __init__(self, classes: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ids (N, L) -> logits (N, classes)."""
        return self.head(self.encoder(self.embed(x) + self.place).mean(1))


class Pretrained(nn.Module):
    """A Hugging Face network and a linear layer on its mean token."""

    def __init__(self, name: str, classes: int):
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise InputError(f"--network {name} needs transformers; pip install it") from None
        if name == "bert":
            config = transformers.BertConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2,
                num_attention_heads=4, intermediate_size=2 * WIDTH, hidden_dropout_prob=0.0,
            )  # fmt: skip
            self.body = transformers.BertModel(config, add_pooling_layer=False)
        else:
            config = transformers.GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, resid_pdrop=0.0,
                bos_token_id=0, eos_token_id=0,
            )  # fmt: skip
            self.body = transformers.GPT2Model(config)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ids (N, L) -> logits (N, classes)."""
        return self.head(self.body(x).last_hidden_state.mean(1))


def make(args: argparse.Namespace, train: Split, classes: int) -> nn.Module:
    """The network asked for."""
    return Classifier(classes) if args.network == "encoder" else Pretrained(args.network, classes)


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this demo."""
    parser = common.new_parser(__doc__)
    parser.add_argument("--network", choices=("encoder", "bert", "gpt2"), default="encoder",
                        help="what to gate")  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train or infer."""
    name = "tokens" if args.network == "encoder" else f"tokens_{args.network}"
    return common.run(name, load, make, args)


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), common.models.ModelError)
