"""asrfront's features of Gemma 4 on a CPU, the one configuration of asrfront with a transform that our kernel has."""

import torch


def gemma4(samples: torch.Tensor) -> torch.Tensor:
    """Return features `[clips, frames, 128]` of samples `[clips, time]` at 16 kHz, all float32, by torch's threads."""
    from asrfront import gemma4

    return torch.from_numpy(gemma4.log_mel_batch(samples.numpy(), torch.get_num_threads())[0])
