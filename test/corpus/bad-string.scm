"machines"
