"""The page of `vdtrain app`."""
