"""The server's application in several processes, which Ray Serve starts, watches and shares the requests among.

The process that clients call passes each request on to a replica, whose application is the one of `accel.serve.http`.
Nothing here is imported unless `serve.executor=ray` asks for it.
"""
