# What the programs share; a reader of the tutorial can skip this folder.
