// Command bench measures smtprelay beside other SMTP clients, all at the same work against the same relay over the same
// delay line, and prints tables of ratios and counts. See BENCHMARKS.md for the method.
//
//	go run .             the matrix, in a quarter of an hour; writes the plots too
//	go run . -quick      a glance, in a minute
//	go run . -all        the product of all dimensions, in hours
//	go run . -peers smtprelay,nodemailer -cells '20 ms'
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 2 && os.Args[1] == "relay":
		err = relayMain(os.Stdin, os.Stdout)
	case len(os.Args) == 3 && os.Args[1] == "peer":
		err = peerMain(os.Args[2], os.Stdout)
	default:
		err = benchMain()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func benchMain() error {
	quick := flag.Bool("quick", false, "a few cells with little work each")
	full := flag.Bool("all", false, "the product of all dimensions")
	only := flag.String("peers", "", "comma-separated names; default all")
	match := flag.String("cells", "", "measure only the cells whose name contains this, and nothing beside the matrix; - means no cell, and all that is beside it")
	plots := flag.String("plots", "", "directory for throughput.svg and rotation.svg; default this one, but none with -quick, -cells or -peers")
	update := flag.String("update", "", "file in which to replace the lines between the marks of the tables, for instance ../BENCHMARKS.md")
	save := flag.String("json", "", "file for all figures")
	load := flag.String("from", "", "measure nothing; take the figures from such a file")
	flag.Parse()

	var r *report
	var err error
	if *load != "" {
		r, err = loadReport(*load)
	} else {
		r, err = measure(*quick, *full, *match, *only)
	}
	if err != nil {
		return err
	}
	if *save != "" {
		b, err := json.Marshal(r)
		if err != nil {
			return err
		}
		if err := os.WriteFile(*save, b, 0o644); err != nil {
			return err
		}
	}
	var tables bytes.Buffer
	r.write(&tables)
	os.Stdout.Write(tables.Bytes())
	if *update != "" {
		if err := replaceBetweenMarks(*update, tables.Bytes()); err != nil {
			return err
		}
	}
	if *plots == "" && !*quick && *match == "" && *only == "" {
		*plots = "."
	}
	if *plots == "" {
		return nil
	}
	for name, write := range map[string]func(io.Writer) error{
		"throughput.svg": func(w io.Writer) error { return writeThroughput(w, r.curves()) },
		"rotation.svg":   func(w io.Writer) error { return writeRotation(w, r.Steady) },
	} {
		var svg bytes.Buffer
		if err := write(&svg); errors.Is(err, errNothingToPlot) {
			continue // of a selection
		} else if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(*plots, name), svg.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func loadReport(name string) (*report, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	r := new(report)
	return r, json.Unmarshal(b, r)
}

// measure runs everything, one thing after the other, always in the same order.
func measure(quick, full bool, match, only string) (*report, error) {
	d, err := newDriver()
	if err != nil {
		return nil, err
	}
	defer d.stop()
	start := time.Now()
	r := &report{Kind: "each dimension varied alone", Machine: machine(d.node)}
	switch {
	case match != "" || only != "":
		r.Kind = "a selection"
	case quick:
		r.Kind = "a quick look"
	case full:
		r.Kind = "the product of all dimensions"
	}
	progress := func(what string) { fmt.Fprintf(os.Stderr, "%4.0f s  %s\n", time.Since(start).Seconds(), what) }
	for _, c := range matrix(quick, full) {
		if match == "-" || !strings.Contains(c.String(), match) {
			continue
		}
		if only != "" {
			c.Peers = slices.DeleteFunc(slices.Clone(c.Peers), func(name string) bool {
				return !slices.Contains(strings.Split(only, ","), name)
			})
		}
		r.Cells = append(r.Cells, cellResult{c, d.runCell(c, func(peer string) { progress(c.String() + ": " + peer) })})
	}
	if match == "-" || match == "" && only == "" {
		r.Openings = d.openings(progress)
		r.Large = d.large(progress)
		r.Waiting = d.waiting(progress)
		if !quick {
			r.Steady = d.steadiness(progress)
		}
	}
	r.Took = took(time.Since(start))
	return r, nil
}

const (
	beginMark = "<!-- tables: begin -->\n"
	endMark   = "<!-- tables: end -->\n"
)

// replaceBetweenMarks puts the tables into a document.
func replaceBetweenMarks(name string, tables []byte) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(b, []byte(beginMark))
	_, after, ok2 := bytes.Cut(rest, []byte(endMark))
	if !ok || !ok2 {
		return fmt.Errorf("%s has no line %q followed by %q", name, beginMark, endMark)
	}
	return os.WriteFile(name, slices.Concat(before, []byte(beginMark), tables, []byte(endMark), after), 0o644)
}
