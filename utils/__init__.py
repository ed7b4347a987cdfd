# What the programs share, and no reader of the tutorial needs: settings, devices, runs on the disk, tokenizers, OpenWebText.
