package main

import (
	"os"
	"strings"
	"testing"
)

func TestEachMutantCanBeMade(t *testing.T) {
	for _, m := range mutants {
		source, err := os.ReadFile("../../" + m.file)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(source), m.old); n != 1 {
			t.Errorf("%s: what it replaces is there %d times in %s, want once", m.name, n, m.file)
		}
	}
}
