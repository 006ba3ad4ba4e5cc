(list
	 	(build-machine (name "ada")))
