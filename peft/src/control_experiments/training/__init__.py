"""How a run trains: options, methods, devices, metering, checkpoints, and the trainer that ties them together."""
