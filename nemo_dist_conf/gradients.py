"""What a user's own training loop calls around its microbatches and before its optimizer step."""

from nemo_dist_conf.runtime.gradients import accumulate, clip_grad_norm_

__all__ = ["accumulate", "clip_grad_norm_"]
