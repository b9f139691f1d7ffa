"""The page of `fastdeit report`: reads run folders, draws figures, looks at a checkpoint, writes HTML."""
