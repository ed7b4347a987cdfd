# Makes this folder a package, so that "from config.gpt3_small import *" finds this one first.
