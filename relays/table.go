package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// printTable prints relay × check, in both modes if there are two, and below it why a cell is not "ok".
func printTable(w io.Writer, columns []fetched, verdicts []verdict) {
	var rows []string
	for _, v := range verdicts {
		if !slices.Contains(rows, v.check) {
			rows = append(rows, v.check)
		}
	}
	states := make(map[[2]string][]string)
	for _, v := range verdicts {
		field := [2]string{v.relay, v.check}
		states[field] = append(states[field], v.state)
	}
	fmt.Fprintf(w, "\n%-26s", "check")
	for _, c := range columns {
		fmt.Fprintf(w, "  %-14s", c.Name)
	}
	fmt.Fprintf(w, "\n%-26s", "(by DATA, in chunks)")
	for _, c := range columns {
		version, _, _ := strings.Cut(c.Version, "-")
		fmt.Fprintf(w, "  %-14s", version)
	}
	fmt.Fprintln(w)
	for _, row := range rows {
		line := fmt.Sprintf("%-26s", row)
		for _, c := range columns {
			line += fmt.Sprintf("  %-14s", strings.Join(states[[2]string{c.Name, row}], ", "))
		}
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
	fmt.Fprintln(w)
	noted := make(map[string]bool)
	for _, v := range verdicts {
		note := fmt.Sprintf("n.a. %s, %s: %s\n", v.relay, v.check, v.reason)
		if v.state == "n.a." && !noted[note] {
			noted[note] = true
			fmt.Fprint(w, note)
		}
	}
	failed := 0
	for _, v := range verdicts {
		if v.state == "FAIL" {
			failed++
			fmt.Fprintf(w, "FAIL %s, %s %s: %s\n", v.relay, v.check, v.mode, firstLine(v.reason))
		}
	}
	passed := 0
	for _, v := range verdicts {
		if v.state == "ok" {
			passed++
		}
	}
	fmt.Fprintf(w, "%d passed, %d failed\n", passed, failed)
}
