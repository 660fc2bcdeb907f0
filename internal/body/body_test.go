// Here belongs which bodies can be written twice, from where, and what is known of their size.
package body

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const text = "skipped Subject: x\n\n.hello\n"

// skip moves r to where the message begins.
func skip[R io.Reader](t *testing.T, r R) R {
	t.Helper()
	if _, err := io.ReadFull(r, make([]byte, len("skipped "))); err != nil {
		t.Fatal(err)
	}
	return r
}

func openFile(t *testing.T) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mail")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// own is a seeker of somebody's own type.
type own struct{ io.ReadSeeker }

// ownWriter writes itself otherwise than it is read.
type ownWriter struct{ io.ReadSeeker }

func (o ownWriter) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, io.MultiReader(strings.NewReader("X: y\n"), o.ReadSeeker))
}

func TestWhatCanBeHadAgainIsWrittenFromWhereItStoodAndLeftThere(t *testing.T) {
	const rest = "Subject: x\n\n.hello\n"
	pipe, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	if _, err := w.WriteString(text); err != nil {
		t.Fatal(err)
	}
	w.Close()
	buffer, file := skip(t, bytes.NewBufferString(text)), skip(t, openFile(t))
	moving := own{skip(t, strings.NewReader(text))}
	for _, tt := range []struct {
		why  string
		body io.WriterTo
		once bool
		want string
		size int64
	}{
		{"bytes", Bytes(rest), false, rest, 22},
		{"a buffer", buffer, false, rest, 22},
		{"a buffer in Reader", Reader(buffer), false, rest, 22},
		{"a bytes.Reader", skip(t, bytes.NewReader([]byte(text))), false, rest, 22},
		{"a strings.Reader", skip(t, strings.NewReader(text)), false, rest, 22},
		{"one in Reader, twice", Reader(Reader(skip(t, strings.NewReader(text))).(io.Reader)), false, rest, 22},
		{"a file", Reader(file), false, rest, 0},
		{"a file, as it is", file, false, rest, 0},
		{"another's seeker", Reader(moving), false, rest, 0},
		{"another's seeker that writes itself", ownWriter{skip(t, strings.NewReader(text))}, false, "X: y\n" + rest, 0},
		{"a section", Reader(skip(t, io.NewSectionReader(strings.NewReader(text), 0, int64(len(text))))), false, rest, 0},
		{"a function", Func(func(w io.Writer) error { _, err := io.WriteString(w, rest); return err }), false, rest, 0},
		{"a pipe: its Seek fails", Reader(skip(t, pipe)), true, rest, 0},
		{"a reader that cannot seek", Reader(bufio.NewReader(strings.NewReader(rest))), true, rest, 0},
	} {
		again := Again(tt.body)
		if Once(again) != tt.once {
			t.Errorf("%s: got Once %t", tt.why, !tt.once)
		}
		if got := Size(again); got != tt.size {
			t.Errorf("%s: got size %d, want %d", tt.why, got, tt.size)
		}
		for try := range 3 {
			var b strings.Builder
			n, err := again.WriteTo(&b)
			if err != nil || b.String() != tt.want || n != int64(len(tt.want)) {
				t.Errorf("%s, try %d: got %d, %v: %q", tt.why, try, n, err, b.String())
			}
			if tt.once {
				break
			}
			again = Again(tt.body) // by the next Send
		}
	}
	if buffer.String() != rest {
		t.Errorf("the buffer has %q left", buffer)
	}
	for _, r := range []io.Reader{file, moving} {
		if left, err := io.ReadAll(r); err != nil || string(left) != rest {
			t.Errorf("%T: left is %q, %v", r, left, err)
		}
	}
}

func TestBodyIsWrittenFromItsBeginningAfterATryThatFailed(t *testing.T) {
	for _, b := range []io.WriterTo{Reader(own{strings.NewReader(text)}), strings.NewReader(text), openFile(t), Reader(openFile(t))} {
		again := Again(b)
		if _, err := again.WriteTo(failing{}); err == nil {
			t.Errorf("%T: no error", b)
		}
		var got strings.Builder
		if _, err := again.WriteTo(&got); err != nil || got.String() != text {
			t.Errorf("%T: got %v: %q", b, err, got.String())
		}
	}
}

type failing struct{}

func (failing) Write(p []byte) (int, error) { return len(p) / 2, errors.New("lost") }

// stuck is a seeker that stays where it is.
type stuck struct {
	io.Reader
	err error
}

func (s stuck) Seek(int64, int) (int64, error) { return 0, s.err }

// late is a seeker that does not go back.
type late struct {
	*strings.Reader
	seeks int
}

func (l *late) Seek(offset int64, whence int) (int64, error) {
	if l.seeks++; l.seeks > 2 {
		return 0, errors.New("tape torn")
	}
	return l.Reader.Seek(offset, whence)
}

func TestBodyThatDoesNotGoBackFails(t *testing.T) {
	if b := Reader(stuck{strings.NewReader(text), errors.New("no")}); Again(b) != b {
		t.Error("a Seek that fails is no Seek")
	}
	again := Again(Reader(struct{ *late }{&late{Reader: strings.NewReader(text)}}))
	if _, err := again.WriteTo(io.Discard); err == nil || !strings.Contains(err.Error(), "tape torn") {
		t.Errorf("got %v, want it known before the message ends", err)
	}
}

func TestFuncTellsItsErrorAndItsOctets(t *testing.T) {
	broken := errors.New("broken")
	n, err := Func(func(w io.Writer) error { io.WriteString(w, "abc"); return broken }).WriteTo(io.Discard)
	if n != 3 || err != broken {
		t.Errorf("got %d, %v", n, err)
	}
}
