"""An HTTP server with OpenAI's API for trained models. It needs the extra `serve`."""
