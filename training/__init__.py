"""Fine-tunes an adapter on episodes: data set rules, packing, loss, step, checkpoints."""
