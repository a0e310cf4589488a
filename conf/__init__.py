"""The Hydra configuration; a package so that `pkg://rb_gpu.conf` finds it in a wheel."""
