"""Studies of samplers and approximations over many images: subjects, settings, sweeps, and the papers' tables."""
