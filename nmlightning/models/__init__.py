"""Networks in plain torch with plain norms; `swap_norms` or `NormSwap` exchanges the norms."""
