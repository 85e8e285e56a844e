"""SGLang servers as the sampler: asking them, giving them weights, keeping them up."""
