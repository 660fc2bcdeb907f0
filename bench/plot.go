// The plots, as SVG written by hand: throughput against round-trip time, and throughput over time.

package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// curve is one line of the plot.
type curve struct {
	name   string
	colour string
	dashed bool
	points []point
}

type point struct{ rtt, rate float64 } // ms; messages a second on each connection

// drawn are the curves of the plot: the peer, whether its relay offers CHUNKING, and the label at the curve's end, which
// distinguishes the curves without colours too.
var drawn = []struct {
	peer, label, colour string
	chunking            bool
}{
	{"smtprelay", "smtprelay, CHUNKING", "#9a3412", true},
	{"smtprelay", "smtprelay", "#ea580c", false},
	{"raw DATA", "the limit with DATA", "#6b7280", false},
	{"mox", "mox smtpclient, kept", "#0f766e", false},
	{"nodemailer", "nodemailer pool", "#15803d", false},
	{"net/smtp kept", "net/smtp, kept", "#1d4ed8", false},
	{"net/smtp SendMail", "net/smtp SendMail", "#7e22ce", false},
}

// curves returns the plot's curves from a report. Without delay a rate depends on the machine and not on the line: omitted.
func (r *report) curves() []curve {
	var all []curve
	for _, d := range drawn {
		c := curve{name: d.label, colour: d.colour, dashed: peerNamed(d.peer).kind == limit}
		for _, res := range r.Cells {
			cell := res.Cell
			if cell.RTT == 0 || cell.TLS != tlsStart || cell.Senders != 100 || cell.Size != 10*kilo || cell.Chunking != d.chunking {
				continue
			}
			if o := res.of(d.peer); o != nil {
				c.points = append(c.points, point{float64(cell.RTT), o.rate() / maxConns})
			}
		}
		slices.SortFunc(c.points, func(a, b point) int { return int(a.rtt - b.rtt) })
		if len(c.points) > 1 {
			all = append(all, c)
		}
	}
	return all
}

// The frame of the plot, in pixels.
const (
	plotWidth, plotHeight    = 760, 440
	plotLeft, plotRight      = 70, 560
	plotTop, plotBottom      = 62, 372
	labelLeft, labelDistance = plotRight + 26, 19
)

// plotHead begins a plot; its arguments are width, height, title, left edge, heading and subheading.
const plotHead = `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" role="img" aria-labelledby="title">
<title id="title">%s</title>
<style>text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2937}.t{font-size:15px;font-weight:600}.s{fill:#4b5563;font-size:12px}.g{stroke:#e5e7eb}.a{stroke:#6b7280}</style>
<rect width="%[1]d" height="%[2]d" fill="#ffffff"/>
<text class="t" x="%[4]d" y="26">%[5]s</text>
<text class="s" x="%[4]d" y="46">%[6]s</text>`

var conditions = fmt.Sprintf("%d connections, %d messages on each, %s bodies, STARTTLS", maxConns, maxMessages, sizeWord(10*kilo))

// scale maps values to pixels, logarithmically.
type scale struct{ low, high, from, to float64 }

func (s scale) at(v float64) float64 {
	return s.from + (s.to-s.from)*math.Log(v/s.low)/math.Log(s.high/s.low)
}

// writeThroughput plots the curves.
func writeThroughput(w io.Writer, curves []curve) error {
	low, high := math.Inf(1), math.Inf(-1)
	rtts := []float64{}
	for _, c := range curves {
		for _, p := range c.points {
			low, high = min(low, p.rate), max(high, p.rate)
			if !slices.Contains(rtts, p.rtt) {
				rtts = append(rtts, p.rtt)
			}
		}
	}
	if len(rtts) < 2 {
		return errNothingToPlot
	}
	slices.Sort(rtts)
	x := scale{rtts[0] * 0.88, rtts[len(rtts)-1] * 1.06, plotLeft, plotRight}
	y := scale{low * 0.75, high * 1.35, plotBottom, plotTop}

	var b strings.Builder
	put := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	put(plotHead, plotWidth, plotHeight, "Messages a second on each connection against round-trip time, for smtprelay and other clients",
		plotLeft, "Messages a second on each connection", conditions+"; both axes logarithmic")

	for _, tick := range ticks(y.low, y.high) {
		at := y.at(tick)
		put(`<line class="g" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/>`, plotLeft, plotRight, at, at)
		put(`<text class="s" x="%d" y="%.1f" text-anchor="end">%g</text>`, plotLeft-8, at+4, tick)
	}
	for _, rtt := range rtts {
		at := x.at(rtt)
		put(`<line class="g" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/>`, at, at, plotTop, plotBottom)
		put(`<text class="s" x="%.1f" y="%d" text-anchor="middle">%g</text>`, at, plotBottom+20, rtt)
	}
	put(`<line class="a" x1="%d" x2="%d" y1="%d" y2="%[3]d"/>`, plotLeft, plotRight, plotBottom)
	put(`<line class="a" x1="%d" x2="%[1]d" y1="%d" y2="%d"/>`, plotLeft, plotTop, plotBottom)
	put(`<text class="s" x="%d" y="%d" text-anchor="middle">round-trip time to the relay, ms</text>`, (plotLeft+plotRight)/2, plotBottom+44)

	places := labelPlaces(curves, y)
	for i, c := range curves {
		dash, width := "", 2.5
		if c.dashed {
			dash, width = ` stroke-dasharray="7 5"`, 1.8
		}
		var path strings.Builder
		for j, p := range c.points {
			fmt.Fprintf(&path, "%c%.1f %.1f", "ML"[min(j, 1)], x.at(p.rtt), y.at(p.rate))
		}
		put(`<path d="%s" fill="none" stroke="%s" stroke-width="%g"%s/>`, path.String(), c.colour, width, dash)
		if !c.dashed {
			for _, p := range c.points {
				put(`<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`, x.at(p.rtt), y.at(p.rate), c.colour)
			}
		}
		end := c.points[len(c.points)-1]
		put(`<path d="M%.1f %.1fL%d %.1f" fill="none" stroke="%s" stroke-width="1"%s/>`,
			x.at(end.rtt)+5, y.at(end.rate), labelLeft-4, places[i], c.colour, dash)
		put(`<text x="%d" y="%.1f" style="fill:%s">%s</text>`, labelLeft, places[i]+4, c.colour, c.name)
	}
	put(`</svg>`)
	_, err := io.WriteString(w, b.String())
	return err
}

// The panels of the other plot, one below the other.
const (
	panelHeight, panelDistance = 84, 112
	tenthWidth                 = 4.9
	tenthsShown                = (plotRight - plotLeft) * 10 / 49
)

// writeRotation plots how much the relay accepted in each tenth of a second of a long run, a panel for each peer.
func writeRotation(w io.Writer, runs []steadiness) error {
	runs = slices.DeleteFunc(slices.Clone(runs), func(s steadiness) bool { return s.Median == 0 })
	if len(runs) == 0 {
		return errNothingToPlot
	}
	var b strings.Builder
	put := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	bottom := plotTop + panelDistance*(len(runs)-1) + panelHeight
	put(plotHead, plotWidth, bottom+68, "Messages accepted in each tenth of a second, across the rotations of the connections", plotLeft,
		"Messages accepted in each tenth of a second; 1 is the median of "+runs[0].Peer, conditions+fmt.Sprintf(", RTT 20 ms, %d messages", runs[0].Messages))
	one := float64(runs[0].Median)
	for i, s := range runs {
		foot := float64(plotTop + panelDistance*i + panelHeight)
		at := func(accepted float64) float64 { return foot - panelHeight*min(accepted/one, 1.4)/1.4 }
		for _, part := range []float64{0.5, 1} {
			y := at(part * one)
			put(`<line class="g" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/>`, plotLeft, plotRight, y, y)
			put(`<text class="s" x="%d" y="%.1f" text-anchor="end">%g</text>`, plotLeft-8, y+4, part)
		}
		colour := colourOf(s.Peer)
		shown := s.Slices[:min(len(s.Slices), tenthsShown)]
		path := fmt.Sprintf("M%d %.1f", plotLeft, foot)
		for tenth, accepted := range shown {
			path += fmt.Sprintf("V%.1fH%.1f", at(float64(accepted)), plotLeft+float64(tenth+1)*tenthWidth)
		}
		put(`<path d="%sV%.1fZ" fill="%s" fill-opacity="0.25" stroke="%s"/>`, path, foot, colour, colour)
		put(`<line class="a" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/>`, plotLeft, plotRight, foot, foot)
		put(`<text x="%d" y="%.1f" style="fill:%s">%s</text>`, plotRight+14, foot-panelHeight/2+4, colour, s.Peer)
		if len(shown) < len(s.Slices) {
			put(`<text class="s" x="%d" y="%.1f">and so on to %d s</text>`, plotRight+14, foot-panelHeight/2+21, (len(s.Slices)+9)/10)
		}
	}
	for second := 0; second*10 <= tenthsShown; second++ {
		put(`<text class="s" x="%.1f" y="%d" text-anchor="middle">%d</text>`, plotLeft+float64(second)*10*tenthWidth, bottom+20, second)
	}
	put(`<text class="s" x="%d" y="%d" text-anchor="middle">seconds since the first connection</text>`, (plotLeft+plotRight)/2, bottom+44)
	put(`</svg>`)
	_, err := io.WriteString(w, b.String())
	return err
}

// colourOf returns the colour of a peer with DATA.
func colourOf(peer string) string {
	for _, d := range drawn {
		if d.peer == peer && !d.chunking {
			return d.colour
		}
	}
	return "#1f2937"
}

var errNothingToPlot = errors.New("bench: nothing to plot")

// ticks returns 1, 2 and 5 times the powers of ten between low and high.
func ticks(low, high float64) []float64 {
	var all []float64
	for power := math.Floor(math.Log10(low)); power <= math.Log10(high); power++ {
		for _, m := range []float64{1, 2, 5} {
			if v := m * math.Pow(10, power); v >= low && v <= high {
				all = append(all, v)
			}
		}
	}
	return all
}

// labelPlaces returns where each curve's label goes: at the curve's end, or as near to it as the labels above allow.
func labelPlaces(curves []curve, y scale) []float64 {
	order := make([]int, len(curves))
	ends := make([]float64, len(curves))
	for i, c := range curves {
		order[i] = i
		ends[i] = y.at(c.points[len(c.points)-1].rate)
	}
	slices.SortStableFunc(order, func(a, b int) int {
		switch {
		case ends[a] < ends[b]:
			return -1
		case ends[a] > ends[b]:
			return 1
		}
		return 0
	})
	// Neighbours that are too near form a group, centred on the mean of its members' ideal places.
	type group struct {
		members []int
		centre  float64
	}
	var groups []group
	for _, i := range order {
		groups = append(groups, group{[]int{i}, ends[i]})
		for len(groups) > 1 {
			a, b := &groups[len(groups)-2], groups[len(groups)-1]
			apart := float64(len(a.members)+len(b.members)) / 2 * labelDistance
			if b.centre-a.centre >= apart {
				break
			}
			n, m := float64(len(a.members)), float64(len(b.members))
			a.centre = (a.centre*n + b.centre*m) / (n + m)
			a.members = append(a.members, b.members...)
			groups = groups[:len(groups)-1]
		}
	}
	places := make([]float64, len(curves))
	for _, g := range groups {
		top := g.centre - float64(len(g.members)-1)/2*labelDistance
		for k, i := range g.members {
			places[i] = top + float64(k)*labelDistance
		}
	}
	return places
}
