"""Graph passes that remove or simplify nodes, in any component: the same numbers from fewer nodes."""
