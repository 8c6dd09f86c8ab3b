"""The commands of `xmixup`, one module each."""
