package wire

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/textproto"
	"strings"
	"testing"
)

// write passes the parts through a BodyWriter, one Write each.
func write(t *testing.T, dots bool, parts ...string) (out string, b *BodyWriter) {
	t.Helper()
	var buf bytes.Buffer
	b = NewBodyWriter(&buf, dots)
	for _, part := range parts {
		if n, err := b.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatalf("Write(%q): got %d, %v, want %d, nil", part, n, err, len(part))
		}
	}
	if err := b.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	return buf.String(), b
}

func TestBodyBecomesCanonicalAndItsDotsAreDoubled(t *testing.T) {
	for _, tt := range []struct {
		why   string
		parts []string
		want  string // with dots doubled
	}{
		{"nothing stays nothing", nil, ""},
		{"CRLF is kept", []string{"a\r\nb\r\n"}, "a\r\nb\r\n"},
		{"bare LF becomes CRLF", []string{"a\nb\n"}, "a\r\nb\r\n"},
		{"bare CR becomes CRLF", []string{"a\rb\r"}, "a\r\nb\r\n"},
		{"a last line without end gets one", []string{"a"}, "a\r\n"},
		{"a last line that has one gets no other", []string{"a\n"}, "a\r\n"},
		{"LF CR are two line ends", []string{"a\n\rb"}, "a\r\n\r\nb\r\n"},
		{"CR CR LF too", []string{"a\r\r\nb"}, "a\r\n\r\nb\r\n"},
		{"empty lines are kept", []string{"\n\n\r\n\r"}, "\r\n\r\n\r\n\r\n"},

		{"CR and LF in two writes are one line end", []string{"a\r", "\nb"}, "a\r\nb\r\n"},
		{"CR and another octet in two writes", []string{"a\r", "b"}, "a\r\nb\r\n"},
		{"CR and CR in two writes", []string{"a\r", "\r", "b"}, "a\r\n\r\nb\r\n"},
		{"CR LF LF in three writes", []string{"\r", "\n", "\n"}, "\r\n\r\n"},
		{"CR at the end of all", []string{"a", "\r"}, "a\r\n"},
		{"a write of nothing between CR and LF", []string{"a\r", "", "\nb"}, "a\r\nb\r\n"},
		{"octet by octet", strings.Split("a\r\n.b\n\n", ""), "a\r\n..b\r\n\r\n"},

		{"a dot at the very start (RFC 5321, 4.5.2)", []string{".a"}, "..a\r\n"},
		{"a dot at the start of a later line", []string{"a\r\n.b\r\n"}, "a\r\n..b\r\n"},
		{"a lone dot, which would end the message", []string{"a\r\n.\r\nb"}, "a\r\n..\r\nb\r\n"},
		{"dots elsewhere are left alone", []string{"a.b.\r\n c.\r\n"}, "a.b.\r\n c.\r\n"},
		{"only the first of several dots is doubled", []string{"...\r\n"}, "....\r\n"},
		{"lines of dots", []string{".\r\n.\r\n.\r\n"}, "..\r\n..\r\n..\r\n"},
		{"a dot that begins a write but no line", []string{"a", ".b"}, "a.b\r\n"},
		{"a dot that begins a write and a line", []string{"a\r\n", ".b"}, "a\r\n..b\r\n"},
		{"a dot in a write of its own", []string{"a\r\n", ".", "\r\n"}, "a\r\n..\r\n"},
		{"a dot as all there is", []string{"."}, "..\r\n"},

		// Endings that some servers took for the end of the message (CVE-2023-51764 and its kin).
		{"smuggling by LF . LF", []string{"a\n.\nMAIL"}, "a\r\n..\r\nMAIL\r\n"},
		{"smuggling by LF . CRLF", []string{"a\n.\r\nMAIL"}, "a\r\n..\r\nMAIL\r\n"},
		{"smuggling by CRLF . LF", []string{"a\r\n.\nMAIL"}, "a\r\n..\r\nMAIL\r\n"},
		{"smuggling by CR . CR", []string{"a\r.\rMAIL"}, "a\r\n..\r\nMAIL\r\n"},
		{"smuggling by CR . LF", []string{"a\r.\nMAIL"}, "a\r\n..\r\nMAIL\r\n"},
		{"smuggling by CR . CRLF", []string{"a\r.\r\nMAIL"}, "a\r\n..\r\nMAIL\r\n"},
		{"smuggling by CRLF . CR", []string{"a\r\n.\rMAIL"}, "a\r\n..\r\nMAIL\r\n"},
		{"smuggling over the border of two writes", []string{"a\r", ".", "\r", "MAIL"}, "a\r\n..\r\nMAIL\r\n"},

		{"NUL and 8-bit octets pass", []string{"\x00\xff\n"}, "\x00\xff\r\n"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got, b := write(t, true, tt.parts...)
			if got != tt.want {
				t.Errorf("%q: got %q, want %q", tt.parts, got, tt.want)
			}
			// None of the rows has a line that begins with two dots and had one.
			plain := strings.ReplaceAll("\n"+tt.want, "\n..", "\n.")[1:]
			if got, _ := write(t, false, tt.parts...); got != plain {
				t.Errorf("%q without doubled dots: got %q, want %q", tt.parts, got, plain)
			}
			if got, want := b.Size(), int64(len(plain)); got != want {
				t.Errorf("%q: got size %d, want %d", tt.parts, got, want)
			}
			all := strings.Join(tt.parts, "")
			if got, want := CanonicalSize([]byte(all)), int64(len(plain)); got != want {
				t.Errorf("%q: got canonical size %d, want %d", tt.parts, got, want)
			}
			if got, want := b.Taken(), int64(len(all)); got != want {
				t.Errorf("%q: got %d octets taken, want %d", tt.parts, got, want)
			}
		})
	}
}

func TestResetMakesABodyWriterAsNew(t *testing.T) {
	_, b := write(t, true, "a\r\nb")
	b.Write([]byte("cut off\r")) // neither its CR nor its sizes may be remembered
	var buf bytes.Buffer
	b.Reset(&buf, false)
	if b.Size() != 0 || b.Taken() != 0 {
		t.Errorf("got size %d and %d taken after Reset, want 0 and 0", b.Size(), b.Taken())
	}
	if _, err := b.Write([]byte("\n.x\n")); err != nil {
		t.Fatal(err)
	}
	if got, want := buf.String(), "\r\n.x\r\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestClosingABodyTwiceAddsNothing(t *testing.T) {
	for _, body := range []string{"", "a", "a\r", "a\r\n"} {
		out, b := write(t, true, body)
		before := b.Size()
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if b.Size() != before {
			t.Errorf("%q became %q, and the second Close added %d octets", body, out, b.Size()-before)
		}
	}
}

// failing takes left octets and then fails.
type failing struct {
	out  bytes.Buffer
	left int
}

var errFull = errors.New("full")

func (f *failing) Write(p []byte) (int, error) {
	if len(p) > f.left {
		n, _ := f.out.Write(p[:f.left])
		f.left = 0
		return n, errFull
	}
	f.left -= len(p)
	return f.out.Write(p)
}

func TestFailureOfTheWriterBelowIsToldWhereverItHappens(t *testing.T) {
	for _, parts := range [][]string{
		{"a\r\n.b\r\nc\r\n"},
		{"one\ntwo\n.three\n"},
		{"one\rtwo\r\r.three"},
		{"a\r", "\nb\r", "c", ".\n", ".", "\r", "."},
		{strings.Repeat("many lines\r\n.and dots\n", 3)},
	} {
		whole, _ := write(t, true, parts...)
		for room := range len(whole) {
			w := &failing{left: room}
			b := NewBodyWriter(w, true)
			var err error
			taken := int64(0)
			for _, part := range parts {
				var n int
				n, err = b.Write([]byte(part))
				taken += int64(n)
				if n > len(part) || n < len(part) && err == nil {
					t.Fatalf("%q with room for %d: Write took %d of %d, %v", parts, room, n, len(part), err)
				}
				if err != nil {
					break
				}
			}
			if err == nil {
				err = b.Close()
			}
			if err != errFull {
				t.Fatalf("%q with room for %d of %d: got %v, want the writer's error", parts, room, len(whole), err)
			}
			if got := w.out.String(); got != whole[:room] {
				t.Errorf("%q with room for %d: got %q, want %q", parts, room, got, whole[:room])
			}
			if b.Taken() != taken {
				t.Errorf("%q with room for %d: got %d taken, want %d", parts, room, b.Taken(), taken)
			}
		}
	}
}

// canonical is the reference: what a body becomes, before dots are doubled.
func canonical(body string) string {
	s := strings.ReplaceAll(body, "\r\n", "\n")
	s = strings.ReplaceAll(s, "\r", "\n")
	if s != "" && !strings.HasSuffix(s, "\n") {
		s += "\n"
	}
	return strings.ReplaceAll(s, "\n", "\r\n")
}

func TestLongLinesAndBlocksAreNoDifferent(t *testing.T) {
	for _, end := range []string{"\r\n", "\n", "\r", "\r\n.\r\n", "\n.\n", "\r.\r", ".\r\n.x"} {
		for n := window - 5; n <= window+5; n++ {
			for _, body := range []string{
				strings.Repeat("x", n) + end + "y",
				strings.Repeat("x", n-2) + "\r\n" + end + "y",
				strings.Repeat(".xxxxxx\r\n", window)[:n] + end + "y",
				strings.Repeat("x", 2*n) + end,
			} {
				// A dot at the start of all needs a line end before it to be found.
				want := strings.ReplaceAll("\r\n"+canonical(body), "\r\n.", "\r\n..")[2:]
				if got, _ := write(t, true, body); got != want {
					t.Fatalf("%d octets that end in %q: got\n%q, want\n%q", len(body), body[len(body)-10:], got, want)
				}
			}
		}
	}
}

func TestBodyTakesTimeInProportionToItsSize(t *testing.T) {
	// A search for the other kind of line end, begun anew at each line and running to the end of the body, would look at
	// 2⁴⁴ octets here and take longer than go test waits.
	const size = 6 << 20
	for _, unit := range []string{"\r", "\n"} {
		body := strings.Repeat(unit, size/len(unit))
		if got, want := CanonicalSize([]byte(body)), int64(2*size); got != want { // each of them becomes CRLF
			t.Errorf("%q over and over: got %d, want %d", unit, got, want)
		}
	}
}

func TestBodyIsWrittenWithoutAllocation(t *testing.T) {
	body := []byte(strings.Repeat("Lorem ipsum\r\n.dolor\nsit amet\r", 100))
	b := NewBodyWriter(io.Discard, true)
	if n := testing.AllocsPerRun(100, func() {
		b.Reset(io.Discard, true)
		b.Write(body)
		b.Close()
	}); n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}

// FuzzBodyWriter holds the writer to the reference and, by way of the final dot, to net/textproto's DotReader. The body is
// written in pieces whose lengths are the octets of cuts.
func FuzzBodyWriter(f *testing.F) {
	for _, body := range []string{
		"", "a", ".", "\r", "\n", "\r\n", "\r\n.\r\n", "a\r\n.\r\nMAIL FROM:<x@y.example>\r\n", "a\r.\rb", "a\n.\nb", "a\r\n.\rb", "a\n.\r\nb", "\r\r\n\n\r",
		"From: a@x.example\nTo: b@y.example\nSubject: hello\n\n.first\n..second\n. third\nlast",
		"Subject: caf\xc3\xa9\r\nMIME-Version: 1.0\r\n\r\n" + strings.Repeat("TG9yZW0gaXBzdW0gZG9sb3Igc2l0IGFtZXQ=\r\n", 3),
		strings.Repeat("x", window-1) + "\r\n." + strings.Repeat("y", 100),
	} {
		f.Add([]byte(body), []byte{1, 0, 2, 1, 7, 64})
	}
	f.Fuzz(func(t *testing.T, body, cuts []byte) {
		want := canonical(string(body))
		plain, _ := write(t, false, string(body))
		if plain != want {
			t.Errorf("%q: got %q, want %q", body, plain, want)
		}
		if got := CanonicalSize(body); got != int64(len(want)) {
			t.Errorf("%q: got canonical size %d, want %d", body, got, len(want))
		}

		out, whole := write(t, true, string(body))
		var parts []string
		for rest := string(body); rest != ""; {
			n := len(rest)
			if len(cuts) > 0 {
				n, cuts = min(n, int(cuts[0])), cuts[1:]
			}
			parts, rest = append(parts, rest[:n]), rest[n:]
		}
		inParts, split := write(t, true, parts...)
		if inParts != out {
			t.Errorf("%q: got %q, want %q as when written at once", parts, inParts, out)
		}
		for _, b := range []*BodyWriter{whole, split} {
			if b.Size() != int64(len(want)) || b.Taken() != int64(len(body)) {
				t.Errorf("%q: got size %d and %d taken, want %d and %d", body, b.Size(), b.Taken(), len(want), len(body))
			}
		}

		// On the wire: whole lines, none of which begins with a single dot.
		if out != "" && !strings.HasSuffix(out, "\r\n") {
			t.Errorf("%q: got %q, whose last line has no end", body, out)
		}
		for line := range strings.SplitAfterSeq(out, "\r\n") {
			line = strings.TrimSuffix(line, "\r\n")
			if strings.ContainsAny(line, "\r\n") {
				t.Errorf("%q: got %q, with a bare CR or LF in %q", body, out, line)
			}
			if strings.HasPrefix(line, ".") && !strings.HasPrefix(line, "..") {
				t.Errorf("%q: got %q, with the unescaped line %q", body, out, line)
			}
		}
		behind := "MAIL FROM:<next@x.example>\r\n"
		in := bufio.NewReader(strings.NewReader(out + ".\r\n" + behind))
		got, err := io.ReadAll(textproto.NewReader(in).DotReader())
		if err != nil || string(got) != strings.ReplaceAll(want, "\r\n", "\n") {
			t.Errorf("%q: net/textproto reads %q, %v of %q, want %q", body, got, err, out, want)
		}
		if rest, _ := io.ReadAll(in); string(rest) != behind {
			t.Errorf("%q: net/textproto leaves %q behind the final dot, want %q", body, rest, behind)
		}
	})
}

func BenchmarkBodyWriter(b *testing.B) {
	const size = 1 << 20
	words := "The quick brown fox jumps over the lazy dog, and the dog does not mind it."
	for _, bb := range []struct{ name, line string }{
		{"base64", strings.Repeat("TWFu", 19) + "\r\n"},
		{"text-crlf", words + "\r\n" + words[:20] + "\r\n" + words[:47] + "\r\n"},
		{"text-lf", words + "\n" + words[:20] + "\n" + words[:47] + "\n"},
		{"dots", ".\r\n"},
		{"bare-cr", "\r"},
		{"no-lines", words},
	} {
		body := []byte(strings.Repeat(bb.line, size/len(bb.line)))
		b.Run(bb.name, func(b *testing.B) {
			out := bufio.NewWriterSize(io.Discard, 16<<10) // as a session's
			w := NewBodyWriter(out, true)
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				w.Reset(out, true)
				w.Write(body)
				w.Close()
			}
		})
	}
	for _, chunk := range []int{32, 512, 32 << 10} { // as of bodies that write themselves
		body := []byte(strings.Repeat(strings.Repeat("TWFu", 19)+"\r\n", size/78))
		b.Run(fmt.Sprintf("writes-of-%d", chunk), func(b *testing.B) {
			out := bufio.NewWriterSize(io.Discard, 16<<10)
			w := NewBodyWriter(out, true)
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				w.Reset(out, true)
				for rest := body; len(rest) > 0; {
					n := min(chunk, len(rest))
					w.Write(rest[:n])
					rest = rest[n:]
				}
				w.Close()
			}
		})
	}
}
