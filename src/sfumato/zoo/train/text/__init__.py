"""Text models for the secure runtime: teachers, and students with cheap operations.

``python -m sfumato.zoo.train.text`` trains both. The user names a folder of data; nothing of it is shipped. Two cores
train a teacher of 4 layers of width 256 in about an hour.
"""
