(list (build-machine (nme "ada") (user "u")))
