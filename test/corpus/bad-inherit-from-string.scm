(list (build-machine (inherit "ada") (port 22)))
