// The tables: ratios and counts, in Markdown.

package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"
)

// report is everything that one run of the command measures.
type report struct {
	Kind     string       `json:"kind"` // which part of the matrix
	Partial  bool         `json:"partial,omitempty"`
	Machine  []string     `json:"machine"`
	Cells    []cellResult `json:"cells"`
	Openings []opening    `json:"openings,omitempty"`
	Steady   []steadiness `json:"steady,omitempty"`
	Large    []outcome    `json:"large,omitempty"`
	Waiting  []waiting    `json:"waiting,omitempty"`
	Took     string       `json:"took"`
}

type cellResult struct {
	Cell     cell      `json:"cell"`
	Outcomes []outcome `json:"outcomes"`
}

// of returns the outcome of a peer, nil if it was not measured or the run failed.
func (c cellResult) of(name string) *outcome {
	for i := range c.Outcomes {
		if o := &c.Outcomes[i]; o.Peer == name && o.rate() > 0 {
			return o
		}
	}
	return nil
}

// best returns the fastest client that is not ours.
func (c cellResult) best() *outcome {
	var best *outcome
	for i := range c.Outcomes {
		o := &c.Outcomes[i]
		if peerNamed(o.Peer).kind == other && o.rate() > 0 && (best == nil || o.rate() > best.rate()) {
			best = o
		}
	}
	return best
}

// yardstick returns the peer that others of a cell are compared with: the cell's best, or the best of the same work with a relay
// that does not offer CHUNKING, since no peer uses CHUNKING.
func (r *report) yardstick(c cellResult) *outcome {
	if best := c.best(); best != nil || !c.Cell.Chunking {
		return best
	}
	if same := r.find(c.Cell.RTT, c.Cell.TLS, c.Cell.Senders, c.Cell.Size, false); same != nil {
		return same.best()
	}
	return nil
}

// cheapest returns the least processor time per message of these peers.
func (c cellResult) cheapest() float64 {
	least := 0.0
	for _, o := range c.Outcomes {
		cpu := o.per(o.Client.CPUNs)
		if peerNamed(o.Peer).kind == other && o.rate() > 0 && (least == 0 || cpu < least) {
			least = cpu
		}
	}
	return least
}

// find returns the cell of this kind, nil if it was not measured.
func (r *report) find(rtt int, tls tlsMode, senders, size int, chunking bool) *cellResult {
	for i := range r.Cells {
		c := r.Cells[i].Cell
		if c.RTT == rtt && c.TLS == tls && c.Senders == senders && c.Size == size && c.Chunking == chunking {
			return &r.Cells[i]
		}
	}
	return nil
}

// ratio returns how many times as fast as b the peer a was in the cell; 0 if either is missing.
func (c *cellResult) ratio(a, b string) float64 {
	if c == nil {
		return 0
	}
	x, y := c.of(a), c.of(b)
	if x == nil || y == nil {
		return 0
	}
	return x.rate() / y.rate()
}

// target is a promised figure and the measured one.
type target struct {
	what string
	want float64
	most bool // want is a maximum, not a minimum
	got  float64
}

func (t target) met() bool { return t.got > 0 && (t.got >= t.want) != (t.most && t.got != t.want) }

// targets compares the measurements with the targets.
func (r *report) targets() []target {
	var ts []target
	add := func(want float64, got float64, format string, args ...any) {
		ts = append(ts, target{what: fmt.Sprintf(format, args...), want: want, got: got})
	}
	for _, rtt := range []int{20, 50} {
		c := r.find(rtt, tlsStart, 100, 10*kilo, false)
		if c == nil {
			continue
		}
		at := func(other string) float64 { return c.ratio("smtprelay", other) }
		add(1.75, at("two round trips"), "RTT %d ms, DATA: times octets in two round trips", rtt)
		add(1.75, at("mox"), "RTT %d ms, DATA: times mox's smtpclient", rtt)
		add(1.75, at("nodemailer"), "RTT %d ms, DATA: times nodemailer", rtt)
		add(3.4, at("net/smtp kept"), "RTT %d ms, DATA: times net/smtp, kept connections", rtt)
		add(3.4, at("go-smtp kept"), "RTT %d ms, DATA: times go-smtp, kept connections", rtt)
		add(10, at("net/smtp SendMail"), "RTT %d ms, DATA: times net/smtp's SendMail", rtt)
		add(0.97, at("raw DATA"), "RTT %d ms, DATA: of the limit", rtt)
	}
	for _, rtt := range []int{20, 50} {
		c := r.find(rtt, tlsStart, 100, 10*kilo, true)
		if c == nil {
			continue
		}
		add(5, c.ratio("smtprelay", "two round trips"), "RTT %d ms, CHUNKING: times octets in two round trips", rtt)
		add(0.9, c.ratio("smtprelay", "raw CHUNKING"), "RTT %d ms, CHUNKING: of the limit with as many in flight", rtt)
		add(12, c.ratio("smtprelay deep", "two round trips"), "RTT %d ms, CHUNKING, %d in flight: times octets in two round trips", rtt, inFlightDeep)
	}
	if c := r.find(0, tlsStart, 100, 10*kilo, false); c != nil {
		if best := c.best(); best != nil {
			add(1.2, c.ratio("smtprelay", best.Peer), "RTT 0: times the fastest peer (%s)", best.Peer)
		}
		if o := c.of("smtprelay"); o != nil {
			ts = append(ts, target{
				what: "RTT 0: processor time per message, of that of the most frugal peer", want: 1, most: true,
				got: o.per(o.Client.CPUNs) / c.cheapest(),
			})
		}
	}
	return ts
}

// The titles of tables with rows for several cells.
const (
	targetsTitle  = "Targets"
	relayTitle    = "The relay's own limit"
	overviewTitle = "Messages a second, as a ratio to the fastest peer of the row"
)

// cellNames returns the names of the measured part of the matrix.
func (r *report) cellNames() string {
	var names []string
	for _, c := range r.Cells {
		names = append(names, shortCell(c.Cell))
	}
	if names == nil {
		return "what is beside the matrix"
	}
	return strings.Join(names, "; ")
}

// write writes the whole report.
func (r *report) write(w io.Writer) {
	fmt.Fprintf(w, "Measured in %s (%s) on: %s.\n", r.Took, r.Kind, strings.Join(r.Machine, "; "))
	r.writeTargets(w)
	writePeers(w)
	r.writeOverview(w)
	r.writeRelay(w)
	for _, c := range r.Cells {
		r.writeCell(w, c)
	}
	r.writeOpenings(w)
	r.writeSteady(w)
	r.writeLarge(w)
	r.writeWaiting(w)
}

func (r *report) writeTargets(w io.Writer) {
	ts := r.targets()
	if len(ts) == 0 {
		return
	}
	fmt.Fprint(w, "\n### "+targetsTitle+"\n\n| smtprelay, 100 senders, 10 KB, STARTTLS | wanted | measured | |\n| --- | ---: | ---: | --- |\n")
	for _, t := range ts {
		sign, verdict, got := "≥", "**missed**", fmt.Sprintf("%.2f", t.got)
		if t.most {
			sign = "<"
		}
		switch {
		case t.got == 0:
			verdict, got = "not measured", "–"
		case t.met():
			verdict = "met"
		}
		fmt.Fprintf(w, "| %s | %s %.4g | %s | %s |\n", t.what, sign, t.want, got, verdict)
	}
}

// writePeers says how each peer is driven.
func writePeers(w io.Writer) {
	fmt.Fprint(w, "\n### Who sends\n\n| name | how |\n| --- | --- |\n")
	for _, p := range peers {
		fmt.Fprintf(w, "| %s | %s |\n", p.name, p.what)
	}
}

// writeRelay writes the relay's capacity: the most that any peer reached without a delay.
func (r *report) writeRelay(w io.Writer) {
	var most *outcome
	var where cellResult
	for _, c := range r.Cells {
		for i := range c.Outcomes {
			if o := &c.Outcomes[i]; c.Cell.RTT == 0 && c.Cell.Size == 10*kilo && o.rate() > 0 && (most == nil || o.rate() > most.rate()) {
				most, where = o, c
			}
		}
	}
	dated := r.find(0, tlsStart, 100, 10*kilo, false)
	if most == nil || dated == nil || dated.best() == nil {
		return
	}
	fmt.Fprintf(w, "\n### "+relayTitle+"\n\nIt took most from %s (%s): %.1f times as many messages a second as from the fastest peer there is "+
		"(%s, STARTTLS, RTT 0)", most.Peer, shortCell(where.Cell), most.rate()/dated.best().rate(), dated.best().Peer)
	if o := dated.of("smtprelay"); o != nil {
		fmt.Fprintf(w, ", and %.1f times as many as from smtprelay", most.rate()/o.rate())
	}
	fmt.Fprint(w, ". The last column of each table is the relay's processor time, in percent of one processor. At RTT 0 client and relay "+
		"share the machine, and a client that causes fewer turns leaves more of it to itself; with a delay the relay is idle most of the time.\n")
}

// writeOverview writes the throughput of every peer in every cell, as a ratio to the best peer of the cell.
func (r *report) writeOverview(w io.Writer) {
	fmt.Fprint(w, "\n### "+overviewTitle+"\n\nThe fastest peer is in bold; smtprelay and what sends octets only (raw, two round trips) do not count as peers. "+
		"Two raw senders and two smtprelays in a row: the deep setting is second.\n\n| cell |")
	var names []string
	for _, p := range peers {
		if !p.deep && p.name != "raw CHUNKING" {
			names = append(names, p.name)
		}
	}
	for _, n := range names {
		fmt.Fprintf(w, " %s |", strings.TrimSuffix(n, " DATA"))
	}
	fmt.Fprint(w, "\n| --- |"+strings.Repeat(" ---: |", len(names))+"\n")
	for _, c := range r.Cells {
		fmt.Fprintf(w, "| %s |", shortCell(c.Cell))
		best := r.yardstick(c)
		for _, n := range names {
			variants := []string{n}
			if c.Cell.Chunking {
				switch n {
				case "smtprelay":
					variants = append(variants, "smtprelay deep")
				case "raw DATA":
					variants = []string{"raw CHUNKING", "raw CHUNKING deep"}
				}
			}
			var figures []string
			for _, v := range variants {
				if o := c.of(v); o != nil && best != nil {
					figure := fmt.Sprintf("%.2f", o.rate()/best.rate())
					if o == best {
						figure = "**" + figure + "**"
					}
					figures = append(figures, figure)
				}
			}
			fmt.Fprintf(w, " %s |", strings.Join(figures, ", "))
		}
		fmt.Fprintln(w)
	}
}

func shortCell(c cell) string {
	s := fmt.Sprintf("%d ms, %s, %s", c.RTT, sizeWord(c.Size), plural(c.Senders, "sender"))
	if c.TLS == tlsNone {
		s += ", no TLS"
	}
	if c.Chunking {
		s += ", CHUNKING"
	}
	return s
}

// writeCell writes all figures of one cell.
func (r *report) writeCell(w io.Writer, c cellResult) {
	fmt.Fprintf(w, "\n### %s\n\n", c.Cell)
	fmt.Fprint(w, "| peer | rate | turns/message | connections | CPU/message | allocations/message | memory | failed | twice | relay busy |\n"+
		"| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	best, cheapest := r.yardstick(c), c.cheapest()
	for _, o := range c.Outcomes {
		if o.Err != "" {
			fmt.Fprintf(w, "| %s | not measured: %s |\n", o.Peer, o.Err)
			continue
		}
		rate, cpu := "–", "–"
		if best != nil {
			rate = fmt.Sprintf("%.2f", o.rate()/best.rate())
		}
		if cheapest > 0 {
			cpu = fmt.Sprintf("%.2f", o.per(o.Client.CPUNs)/cheapest)
		}
		turns, allocs := "–", "–"
		if c.Cell.RTT > 0 {
			turns = fmt.Sprintf("%.2f", o.per(int64(o.Relay.Turns)))
		}
		if o.Client.Mallocs >= 0 {
			allocs = fmt.Sprintf("%.0f", o.per(o.Client.Mallocs))
		}
		fmt.Fprintf(w, "| %s | %s | %s | %d of %d | %s | %s | %.1f MB | %d | %d | %.0f %% |\n",
			o.Peer, rate, turns, o.Relay.MaxOpen, o.Relay.Connections, cpu, allocs,
			float64(o.Client.PeakRSS-o.Client.IdleRSS)/1e6, o.Client.Failed, o.Relay.Duplicates, 100*o.busy())
	}
	var notes []string
	for _, o := range c.Outcomes {
		r := o.Relay
		for _, n := range []struct {
			count      int
			noun, what string
		}{
			{r.Refused, "connection", " over the limit"}, {r.OverLimit, "message", " over the limit of a connection (421)"},
			{r.Violations, "command", " refused"}, {r.Noops, "NOOP", ""}, {r.Unnamed, "message", " without Message-ID"},
			{max(0, r.Accepted-o.Client.Sent), "message", " accepted by the relay and not known to the client"},
		} {
			if n.count > 0 {
				notes = append(notes, fmt.Sprintf("%s: %s%s", o.Peer, plural(n.count, n.noun), n.what))
			}
		}
		if len(o.Client.Errors) > 0 {
			notes = append(notes, fmt.Sprintf("%s: first failure: %s", o.Peer, o.Client.Errors[0]))
		}
	}
	if len(notes) > 0 {
		fmt.Fprintf(w, "\n%s.\n", strings.Join(notes, "; "))
	}
}

func (r *report) writeOpenings(w io.Writer) {
	if len(r.Openings) == 0 {
		return
	}
	fmt.Fprint(w, "\n### Turns from the dial to the first receipt\n\nThe SYN is the first; full handshake / resumed session, "+
		"where the client resumes one.\n\n| peer | in the clear | implicit, TLS 1.3 | implicit, TLS 1.2 | STARTTLS, TLS 1.3 | STARTTLS, TLS 1.2 |\n"+
		"| --- | ---: | ---: | ---: | ---: | ---: |\n")
	var names []string
	for _, o := range r.Openings {
		if !slices.Contains(names, o.Peer) {
			names = append(names, o.Peer)
		}
	}
	for _, name := range names {
		fmt.Fprintf(w, "| %s |", name)
		for _, o := range r.Openings {
			if o.Peer != name {
				continue
			}
			switch {
			case o.Err != "":
				fmt.Fprintf(w, " not measured: %s |", o.Err)
			case o.TLS == tlsNone:
				fmt.Fprintf(w, " %d |", o.Fresh)
			case o.Resumed == 0:
				fmt.Fprintf(w, " %d / – |", o.Fresh)
			default:
				fmt.Fprintf(w, " %d / %d |", o.Fresh, o.Resumed)
			}
		}
		fmt.Fprintln(w)
	}
}

func (r *report) writeSteady(w io.Writer) {
	if len(r.Steady) == 0 {
		return
	}
	fmt.Fprint(w, "\n### A long run, in tenths of a second\n\nRTT 20 ms; messages that the relay accepted in each whole tenth. "+
		"Connections that were opened together are used up together. smtprelay lets them do so twice, since to spread them costs a set-up more on each place, "+
		"and spreads them where load goes on. \"Rate\" is that of the whole run, as a ratio to the last row's.\n\n"+
		"| peer | messages | rate | least / median | least / median after 2,500 | most / median |\n| --- | ---: | ---: | ---: | ---: | ---: |\n")
	last := r.Steady[len(r.Steady)-1]
	for _, s := range r.Steady {
		if s.Err != "" || s.Median == 0 {
			fmt.Fprintf(w, "| %s | not measured: %s |\n", s.Peer, s.Err)
			continue
		}
		of := func(n int) float64 { return float64(n) / float64(s.Median) }
		rate := "–"
		if last.Rate > 0 {
			rate = fmt.Sprintf("%.2f", s.Rate/last.Rate)
		}
		fmt.Fprintf(w, "| %s | %d | %s | %.2f | %.2f | %.2f |\n", s.Peer, s.Messages, rate, of(s.Min), of(s.Later), of(s.Max))
	}
}

func (r *report) writeLarge(w io.Writer) {
	if len(r.Large) == 0 {
		return
	}
	fmt.Fprint(w, "\n### Bodies of 25 MB, written in pieces\n\nOne sender, RTT 0, STARTTLS.\n\n| peer | memory above idle | allocated per message |\n| --- | ---: | ---: |\n")
	for _, o := range r.Large {
		if o.Err != "" {
			fmt.Fprintf(w, "| %s | not measured: %s |\n", o.Peer, o.Err)
			continue
		}
		allocated := "–"
		if o.Client.Octets >= 0 {
			allocated = fmt.Sprintf("%.2f MB", o.per(o.Client.Octets)/1e6)
		}
		fmt.Fprintf(w, "| %s | %.1f MB | %s |\n", o.Peer, float64(o.Client.PeakRSS-o.Client.IdleRSS)/1e6, allocated)
	}
}

func (r *report) writeWaiting(w io.Writer) {
	if len(r.Waiting) == 0 {
		return
	}
	fmt.Fprintf(w, "\n### %d Sends that wait for a connection\n\nHeap and stacks, the caller's own goroutine (or promise) included; "+
		"the first row is a goroutine that waits on a channel and does nothing else.\n\n| peer | octets for each |\n| --- | ---: |\n", waiters)
	for _, o := range r.Waiting {
		if o.Err != "" {
			fmt.Fprintf(w, "| %s | not measured: %s |\n", o.Peer, o.Err)
			continue
		}
		fmt.Fprintf(w, "| %s | %d |\n", o.Peer, o.Octets)
	}
}

// machine describes what this runs on.
func machine(node string) []string {
	m := []string{fmt.Sprintf("%d processors, %s", runtime.NumCPU(), processor()), runtime.GOOS + "/" + runtime.GOARCH, runtime.Version()}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		m = append(m, "load before the first run "+strings.Fields(string(load))[0])
	}
	if node != "" {
		if v, err := exec.Command(node, "--version").Output(); err == nil {
			m = append(m, "node "+strings.TrimSpace(string(v)))
		}
	}
	return m
}

func processor() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				return strings.TrimSpace(value)
			}
		}
	}
	return "of a kind that the system does not name"
}

func took(d time.Duration) string {
	return fmt.Sprintf("%d min %d s", int(d.Minutes()), int(d.Seconds())%60)
}
