(list (build-machine (name "é🔑") (name "x")))
