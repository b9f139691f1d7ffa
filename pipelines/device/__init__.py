"""The device augmentation stage: a GPU makes the same pixels as `fastdeit.pipelines.host`."""
