"""What X differentiates: the entropy, by score or Rao-Blackwellised, per response or per token."""
