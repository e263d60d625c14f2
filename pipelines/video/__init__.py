"""Video from file to file: frames one after another through a pipeline, everything else of the file as it was."""
