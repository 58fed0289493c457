"""Draft methods, one folder each; the draft vocabulary; facts about target families."""
