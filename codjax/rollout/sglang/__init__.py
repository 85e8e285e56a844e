"""Language models that SGLang servers run: asking them, giving them weights, keeping them up."""
