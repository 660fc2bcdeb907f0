// Command bench compares smtprelay with other SMTP clients, which do the same work against the same relay over the same delay
// line, and prints tables of ratios and counts. See BENCHMARKS.md for the method.
//
//	go run .             the matrix, in a quarter of an hour; writes the plots too
//	go run . -quick      a glance, in a minute
//	go run . -all        the product of all dimensions, in hours
//	go run . -peers smtprelay,nodemailer -cells '20 ms'
//	go run . -cells 'RTT 20 ms, TLS by STARTTLS, (1 sender|100 senders), 10 KB' -update ../BENCHMARKS.md
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
	"regexp"
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
	match := flag.String("cells", "", "measure only the cells whose name matches this regular expression, and nothing beside the matrix; - means no cell, and all that is beside it")
	plots := flag.String("plots", "", "directory for throughput.svg and rotation.svg; default this one, but none with -quick, -cells or -peers")
	update := flag.String("update", "", "file in which to replace the lines between the marks of the tables, for instance ../BENCHMARKS.md; with -cells only those of the cells measured. Those with CHUNKING need the same cell without it, to which their rates are ratios")
	save := flag.String("json", "", "file for all figures")
	load := flag.String("from", "", "measure nothing; take the figures from such a file")
	flag.Parse()
	cells, err := regexp.Compile(*match)
	switch {
	case err != nil:
		return fmt.Errorf("-cells: %w", err)
	case *update != "" && *only != "":
		return errors.New("-peers with -update: the rows of some peers are ratios to others")
	}

	var r *report
	if *load != "" {
		r, err = loadReport(*load)
	} else {
		r, err = measure(*quick, *full, cells, *only)
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
		if err := r.update(*update, tables.String()); err != nil {
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
func measure(quick, full bool, match *regexp.Regexp, only string) (*report, error) {
	d, err := newDriver()
	if err != nil {
		return nil, err
	}
	defer d.stop()
	start := time.Now()
	r := &report{Kind: "each dimension varied alone", Machine: machine(d.node)}
	everything := match.String() == "" && only == ""
	switch {
	case quick:
		r.Kind = "a quick look"
	case full:
		r.Kind = "the product of all dimensions"
	}
	progress := func(what string) { fmt.Fprintf(os.Stderr, "%4.0f s  %s\n", time.Since(start).Seconds(), what) }
	for _, c := range matrix(quick, full) {
		if beside(match) || !match.MatchString(c.String()) {
			continue
		}
		if only != "" {
			c.Peers = slices.DeleteFunc(slices.Clone(c.Peers), func(name string) bool {
				return !slices.Contains(strings.Split(only, ","), name)
			})
		}
		r.Cells = append(r.Cells, cellResult{c, d.runCell(c, func(peer string) { progress(c.String() + ": " + peer) })})
	}
	if beside(match) || everything {
		r.Openings = d.openings(progress)
		r.Large = d.large(progress)
		r.Waiting = d.waiting(progress)
		if !quick {
			r.Steady = d.steadiness(progress)
		}
	}
	if !everything {
		r.Partial = true
		r.Kind = "only " + r.cellNames()
		if quick {
			r.Kind += ", with little work"
		}
	}
	r.Took = took(time.Since(start))
	return r, nil
}

// beside reports whether to measure only what is beside the matrix.
func beside(match *regexp.Regexp) bool { return match.String() == "-" }

const (
	beginMark = "<!-- tables: begin -->\n"
	endMark   = "<!-- tables: end -->\n"
)

// update writes the tables into a document: all of them, or those of a partial run among the existing ones.
func (r *report) update(name, tables string) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(b), beginMark)
	older, after, ok2 := strings.Cut(rest, endMark)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no line %q followed by %q", name, beginMark, endMark)
	}
	if r.Partial {
		tables = mergeTables(older, tables)
	}
	return os.WriteFile(name, []byte(before+beginMark+tables+endMark+after), 0o644)
}

// mergeTables merges newer tables into older ones. In tables with a row for each cell, only the rows of the newer tables change;
// the table of a single cell is replaced as a whole.
func mergeTables(older, newer string) string {
	const heading = "\n### "
	said, sections, ok := strings.Cut(older, heading)
	saidNow, sectionsNow, okNow := strings.Cut(newer, heading)
	if !ok || !okNow {
		return newer
	}
	title := func(section string) string { return firstPart(section, "\n") }
	lines := merge(strings.SplitAfter(strings.TrimSpace(said)+"\n", "\n"), []string{saidNow}, func(line string) string {
		return firstPart(line[strings.Index(line, "(")+1:], ") on: ") // what was measured
	}, nil)
	merged := merge(strings.Split(sections, heading), strings.Split(sectionsNow, heading), title, func(section, now string) string {
		switch title(section) {
		case targetsTitle, overviewTitle:
			row := func(line string) string { return firstPart(strings.TrimPrefix(line, "| "), " |") }
			return strings.Join(merge(strings.Split(section, "\n"), strings.Split(now, "\n"), row, nil), "\n")
		case relayTitle:
			return section // it is the most of all cells
		}
		return now
	})
	return strings.Join(lines, "") + heading + strings.Join(merged, heading)
}

// merge replaces, for each part of newer, the part of older with the same key by join of both; join nil means by the newer. A
// part without a match is inserted after its predecessor, or at the end.
func merge(older, newer []string, key func(string) string, join func(older, newer string) string) []string {
	last := len(older) - 1
	for _, n := range newer {
		i := slices.IndexFunc(older, func(o string) bool { return key(o) == key(n) })
		switch {
		case i < 0:
			last++
			older = slices.Insert(older, last, n)
			continue
		case join != nil:
			n = join(older[i], n)
		}
		older[i], last = n, i
	}
	return older
}

func firstPart(s, separator string) string {
	first, _, _ := strings.Cut(s, separator)
	return first
}
