package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func writeFile(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestMessagesHaveTheirSizeInEveryForm(t *testing.T) {
	for _, size := range []int{0, kilo, 10 * kilo, len(block) + len(header), len(block) + len(header) + 1, len(block) + len(header) + 2, mega + 7} {
		whole := newMessage(size)
		stamp(whole, 42)
		if len(whole) != max(size, len(header)+2) || !bytes.HasSuffix(whole, []byte("\r\n")) {
			t.Errorf("a message of %d octets has %d and ends with %q", size, len(whole), whole[len(whole)-2:])
		}
		if !bytes.Contains(whole, []byte("Message-ID: <"+messageID(42)+">\r\n")) {
			t.Errorf("message 42 does not have its number: %q", whole[:len(header)])
		}
		var written bytes.Buffer
		if n, err := newStream(size, 42).WriteTo(&written); err != nil || int(n) != len(whole) {
			t.Errorf("a stream of %d octets wrote %d, %v", len(whole), n, err)
		}
		read, err := io.ReadAll(newStream(size, 42).reader())
		if err != nil || !bytes.Equal(read, written.Bytes()) || !bytes.HasSuffix(read, []byte("\r\n")) {
			t.Errorf("a message of %d octets: reader and WriteTo differ: %d and %d, %v", size, len(read), written.Len(), err)
		}
	}
}

func TestSourceHandsOutEachNumberOnce(t *testing.T) {
	s := newSource(3, 0)
	for _, want := range []int64{1, 2, 3, 0, 0} {
		if got := s.next(); got != want {
			t.Errorf("got %d, want %d", got, want)
		}
	}
}

func TestTablesBetweenTheMarksAreReplaced(t *testing.T) {
	name := writeFile(t, "before\n"+beginMark+"old\n"+endMark+"after\n")
	if err := new(report).update(name, "new\n"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if want := "before\n" + beginMark + "new\n" + endMark + "after\n"; string(b) != want {
		t.Errorf("got %q, want %q", b, want)
	}
	if err := new(report).update(writeFile(t, "no marks"), ""); err == nil {
		t.Error("a document without marks was changed")
	}
}

func TestPartialRunReplacesOnlyItsRows(t *testing.T) {
	section := func(title string, lines ...string) string {
		return "\n### " + title + "\n\n| what | figure |\n| --- | ---: |\n" + strings.Join(lines, "\n") + "\n"
	}
	older := "Measured (all) on: x.\n" +
		section(targetsTitle, "| at 20 | 1 |", "| at 50 | 1 |") +
		section(overviewTitle, "| 20 ms | 1 |", "| 50 ms | 1 |") +
		section(relayTitle, "| most | 1 |") +
		section("RTT 20 ms", "| gone | 1 |", "| smtprelay | 1 |") +
		section("RTT 50 ms", "| smtprelay | 1 |")
	newer := "Measured (only 20 ms) on: y.\n" +
		section(targetsTitle, "| at 20 | 2 |") +
		section(overviewTitle, "| 20 ms | 2 |", "| 20 ms, 1 sender | 2 |") +
		section(relayTitle, "| most | 2 |") +
		section("RTT 20 ms", "| smtprelay | 2 |") +
		section("RTT 20 ms, 1 sender", "| smtprelay | 2 |")
	want := "Measured (all) on: x.\nMeasured (only 20 ms) on: y.\n" +
		section(targetsTitle, "| at 20 | 2 |", "| at 50 | 1 |") +
		section(overviewTitle, "| 20 ms | 2 |", "| 20 ms, 1 sender | 2 |", "| 50 ms | 1 |") +
		section(relayTitle, "| most | 1 |") +
		section("RTT 20 ms", "| smtprelay | 2 |") +
		section("RTT 20 ms, 1 sender", "| smtprelay | 2 |") +
		section("RTT 50 ms", "| smtprelay | 1 |")
	name := writeFile(t, beginMark+older+endMark)
	for _, times := range []string{"once", "twice"} {
		if err := (&report{Partial: true}).update(name, newer); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(name); err != nil || string(b) != beginMark+want+endMark {
			t.Errorf("%s: got %s%v, want\n%s", times, b, err, want)
		}
	}
	if got := mergeTables("old\n", newer); got != newer {
		t.Errorf("without older tables: got %s", got)
	}
}

// sample is a report in which only turns take time.
func sample() *report {
	turns := map[string]float64{
		"smtprelay": 1.07, "raw DATA": 1.07, "two round trips": 2.07, "mox": 2.08, "nodemailer": 2.1, "net/smtp kept": 4.08,
		"go-smtp kept": 4.08, "net/smtp SendMail": 12,
	}
	r := &report{}
	for _, rtt := range []int{5, 20, 50, 100} {
		c := cellResult{Cell: base(rtt)}
		for name, n := range turns {
			c.Outcomes = append(c.Outcomes, outcome{Peer: name, Client: result{
				Sent: 1000, WallNs: int64(1000 / 10 * n * float64(rtt) * 1e6), CPUNs: int64(n * 1e6),
			}})
		}
		r.Cells = append(r.Cells, c)
		c = cellResult{Cell: base(rtt)}
		c.Cell.Chunking = true
		c.Outcomes = []outcome{{Peer: "smtprelay", Client: result{Sent: 1000, WallNs: int64(100 * 0.32 * float64(rtt) * 1e6)}}}
		r.Cells = append(r.Cells, c)
	}
	return r
}

func TestTargetsCompareWithTheMeasurements(t *testing.T) {
	r := sample()
	met := 0
	for _, tg := range r.targets() {
		if tg.met() {
			met++
		} else if !strings.Contains(tg.what, "CHUNKING") || tg.got != 0 {
			t.Errorf("%s: %.2f, want %.2f", tg.what, tg.got, tg.want)
		}
	}
	if met != 14 {
		t.Errorf("%d targets at 20 and 50 ms with DATA, want 7 each", met)
	}
	for _, tc := range []struct {
		target target
		met    bool
	}{
		{target{want: 2, got: 2}, true},
		{target{want: 2, got: 1.9}, false},
		{target{want: 2, got: 0}, false},
		{target{want: 1, got: 0.9, most: true}, true},
		{target{want: 1, got: 1.1, most: true}, false},
	} {
		if tc.target.met() != tc.met {
			t.Errorf("%+v: met is %v", tc.target, !tc.met)
		}
	}
	var tables strings.Builder
	r.write(&tables)
	for _, want := range []string{"| 20 ms, 10 KB, 100 senders | 1.94 | 1.94 | 1.00 | **1.00** |", "| smtprelay | 1.94 |"} {
		if !strings.Contains(tables.String(), want) {
			t.Errorf("the tables have no %q:\n%s", want, tables.String())
		}
	}
}

func TestPlotHasRoomForEveryLabel(t *testing.T) {
	var svg bytes.Buffer
	curves := sample().curves()
	if err := writeThroughput(&svg, curves); err != nil {
		t.Fatal(err)
	}
	if len(curves) != len(drawn) {
		t.Errorf("%d curves, want %d", len(curves), len(drawn))
	}
	places := labelPlaces(curves, scale{0.5, 300, plotBottom, plotTop})
	for i, a := range places {
		if a < plotTop || a > plotHeight-10 {
			t.Errorf("the label of %s is outside, at %.0f", curves[i].name, a)
		}
		for j, b := range places[:i] {
			if d := a - b; d > -labelDistance+0.01 && d < labelDistance-0.01 {
				t.Errorf("the labels of %s and %s are %.1f apart", curves[i].name, curves[j].name, d)
			}
		}
	}
	if err := writeThroughput(io.Discard, nil); err != errNothingToPlot {
		t.Errorf("an empty plot: %v", err)
	}
}

func TestRotationPlotHasAStepForEachTenth(t *testing.T) {
	var svg bytes.Buffer
	runs := []steadiness{
		{Peer: "smtprelay", Messages: 100, Median: 50, Slices: []int{0, 25, 50, 100, 50}},
		{Peer: "raw DATA", Err: "failed"},
		{Peer: "nodemailer", Messages: 100, Median: 20, Slices: make([]int, 2*tenthsShown)},
	}
	if err := writeRotation(&svg, runs); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(svg.String(), "<path "); n != 2 {
		t.Errorf("%d panels, want 2", n)
	}
	foot := plotTop + panelHeight
	want := fmt.Sprintf("M%d %d.0V%d.0H74.9V%d.0H79.8V%d.0H84.7V%d.0H89.6V%d.0H94.5V%d.0Z", plotLeft, foot, foot, foot-30, foot-60, foot-84, foot-60, foot)
	if !strings.Contains(svg.String(), want) {
		t.Errorf("no path %s in\n%s", want, svg.String())
	}
	if err := writeRotation(io.Discard, runs[1:2]); err != errNothingToPlot {
		t.Errorf("an empty plot: %v", err)
	}
}
