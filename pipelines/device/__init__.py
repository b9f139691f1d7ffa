"""The device augmentation stage: the pixels of `fastdeit.pipelines.host`, made by a GPU."""
