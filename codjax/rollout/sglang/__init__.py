"""SGLang servers as the sampler: wire format, connections, routing over replicas, weight pushes."""
