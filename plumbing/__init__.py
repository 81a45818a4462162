"""Files, arrays, images, tables, runs, backbones, processes: what one need not read to follow the method."""
