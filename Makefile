# make demo: environment and the whole pipeline on the example data; make test: lint and all tests
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
# small networks from scratch: the ImageNet recipe that train.py defaults to would not fit here
SMALL := --weights none --backbone regnet_tiny --hidden 64 --dropout 0 --loss bce --lr 1e-3 --head_lr 1e-3 \
         --schedule cosine --patience 20 --batch_size 8 --workers 0
SEED ?= 0
DEMO := --runs_dir demo/runs --data_dir demo/data --fold all --seed $(SEED)

.PHONY: demo demo_chipnet demo_crop demo_cropnet demo_resnet demo_vit demo_pattern test lint example_weights clean

demo: .venv/installed
	rm -rf demo
	$(RUN) preprocess.py --output_dir demo/data
	$(MAKE) --jobs 2 demo_cropnet demo_resnet demo_vit demo_pattern
	$(RUN) ensemble.py weights --runs_dir demo/runs
	$(RUN) report.py demo/runs/ensemble
	$(RUN) example_data/overview.py --demo_dir demo

# side by side, since networks so small gain nothing by a second thread
demo_chipnet demo_crop demo_cropnet demo_resnet demo_vit demo_pattern: export OMP_NUM_THREADS := 1
demo_chipnet:
	$(RUN) train.py --model chipnet $(DEMO) $(SMALL) --epochs 20
demo_crop: demo_chipnet
	$(RUN) crop.py --run demo/runs/chipnet --data_dir demo/data --backbone regnet_tiny --weights none
demo_cropnet: demo_crop
	$(RUN) train.py --model cropnet $(DEMO) $(SMALL) --epochs 12
demo_resnet:
	$(RUN) train.py --model resnet $(DEMO) $(SMALL) --epochs 20
demo_vit:
	$(RUN) train.py --model fsg_vit $(DEMO) $(SMALL) --backbone vit_tiny --epochs 20
# three classes instead of two
demo_pattern:
	$(RUN) preprocess.py --target_col pattern --output_dir demo/pattern
	$(RUN) crop.py --source saliency --data_dir demo/pattern --backbone regnet_tiny --weights none
	$(RUN) train.py --model cropnet --crop_dir demo/pattern/crops/saliency $(DEMO) $(SMALL) --loss ce --epochs 12 \
	    --data_dir demo/pattern --runs_dir demo/pattern/runs

test: .venv/installed-dev lint
	$(RUN) -m pytest --numprocesses 2 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff check .

# the weights in example_data/: the demo's ChipNet, trained longer
example_weights: .venv/installed
	$(RUN) preprocess.py --output_dir demo/data --overwrite
	$(RUN) train.py --model chipnet --runs_dir example_data/runs --data_dir demo/data \
	    $(SMALL) --epochs 40 --patience 40 --overwrite
	rm -f example_data/runs/chipnet/fold*_last.pt

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

clean:
	rm -rf .venv demo data runs predictions exports features looks hour
