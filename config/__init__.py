# Makes this folder win over an installed package of the same name: "from config.gpt3_small import *".
