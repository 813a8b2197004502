"""Files on disk become `Conversation`s and `Question`s, one reader per published format.

Every reader is a function `read(path, ..., rejects=None)`. A row that cannot be used raises `DataError`, or,
where `rejects` is given, is appended to it as a `Reject` and reading continues; a file that cannot be used
always raises. See `rejects`.
"""
