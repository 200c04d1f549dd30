"""Where samples come from; knows nothing of stages. `text` prepares without torch, `batches` reads with it."""
