"""Places outside a run where passage vectors can live: Milvus, PostgreSQL with pgvector, folders of files.

Each module is the only home of its client library and loads it when it is used; every refusal of a server is an
`InputError`. What a place holds is described by its `Card`, which names the model that made the vectors.
"""
