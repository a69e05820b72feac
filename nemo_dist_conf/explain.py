"""Help texts of every option: ``python -m nemo_dist_conf.explain strategy=ddp parallelism hydra/launcher=torchrun``."""

from nemo_dist_conf.composition.explain import explain, main

__all__ = ["explain", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
