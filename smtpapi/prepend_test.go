package smtpapi_test

// Prepend: the body stays what it was, and a field without a message is never written.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtpapi"
	"github.com/smtprelay/smtprelay/smtptest"
)

const (
	message = "Subject: hello\r\n\r\nHello.\r\n"
	field   = "X-SMTPAPI: {\"category\":[\"orders\"]}\r\n"
)

var orders = smtpapi.Header{Category: []string{"orders"}}

// writerTo is a body that is no io.Reader.
type writerTo func(w io.Writer) (int64, error)

func (f writerTo) WriteTo(w io.Writer) (int64, error) { return f(w) }

func TestPrependedBodyCanBeWrittenAsOftenAsTheBody(t *testing.T) {
	inPieces := writerTo(func(w io.Writer) (n int64, err error) {
		for line := range strings.Lines(message) {
			k, err := io.WriteString(w, line)
			if n += int64(k); err != nil {
				return n, err
			}
		}
		return n, nil
	})
	for _, body := range []io.WriterTo{smtprelay.Bytes([]byte(message)), inPieces, bytes.NewBufferString(message), smtprelay.Reader(strings.NewReader(message))} {
		body = smtpapi.Prepend(orders, body)
		if _, ok := body.(io.Reader); ok {
			t.Error("it is an io.Reader, as if it were used up by writing")
		}
		for range 3 {
			var b strings.Builder
			if n, err := body.WriteTo(&b); err != nil || b.String() != field+message || n != int64(b.Len()) {
				t.Errorf("got %d, %v: %q", n, err, b.String())
			}
		}
	}
}

func TestPrependedBodyIsUsedUpAsTheBodyIs(t *testing.T) {
	for name, body := range map[string]func() io.WriterTo{
		"Reader": func() io.WriterTo { return smtprelay.Reader(iotest.OneByteReader(strings.NewReader(message))) },
		"bufio":  func() io.WriterTo { return bufio.NewReader(strings.NewReader(message)) },
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			once := smtpapi.Prepend(orders, body())
			if n, err := once.WriteTo(&b); err != nil || b.String() != field+message || n != int64(b.Len()) {
				t.Errorf("WriteTo: got %d, %v: %q", n, err, b.String())
			}
			if n, err := once.WriteTo(&b); n != 0 || err != nil {
				t.Errorf("WriteTo once more: %d, %v", n, err)
			}
			r, ok := smtpapi.Prepend(orders, body()).(io.Reader)
			if !ok {
				t.Fatal("it is no io.Reader")
			}
			if err := iotest.TestReader(r, []byte(field+message)); err != nil {
				t.Error(err)
			}
			// What Read has left, WriteTo writes.
			half := smtpapi.Prepend(orders, body())
			b.Reset()
			if _, err := io.CopyN(&b, half.(io.Reader), 5); err != nil {
				t.Fatal(err)
			}
			if _, err := half.WriteTo(&b); err != nil || b.String() != field+message {
				t.Errorf("Read, then WriteTo: %v: %q", err, b.String())
			}
		})
	}
}

func TestNoFieldIsWrittenWithoutAMessage(t *testing.T) {
	broken := errors.New("broken")
	for _, test := range []struct {
		name string
		h    smtpapi.Header
		body io.WriterTo
		want string // of the error
	}{
		{"empty bytes", orders, smtprelay.Bytes(nil), ""},
		{"empty writes", orders, writerTo(func(w io.Writer) (int64, error) { w.Write(nil); return 0, nil }), ""},
		{"empty reader", orders, smtprelay.Reader(strings.NewReader("")), ""},
		{"body fails at once", orders, writerTo(func(io.Writer) (int64, error) { return 0, broken }), "broken"},
		{"reader fails at once", orders, smtprelay.Reader(iotest.ErrReader(broken)), "broken"},
		{"mistakes", smtpapi.Header{ASMGroupID: -1}, smtprelay.Bytes([]byte(message)), "asm_group_id: -1 is negative"},
		{"mistakes, reader", smtpapi.Header{ASMGroupID: -1}, bytes.NewBufferString(message), "asm_group_id: -1 is negative"},
		{"continues the field", orders, smtprelay.Bytes([]byte(" x\r\n" + message)), "the message begins with white space"},
		{"continues the field, reader", orders, bytes.NewBufferString("\tx\r\n" + message), "the message begins with white space"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var b strings.Builder
			n, err := smtpapi.Prepend(test.h, test.body).WriteTo(&b)
			if n != 0 || b.Len() != 0 {
				t.Errorf("%d octets written: %q", n, b.String())
			}
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
	if smtpapi.Prepend(orders, nil) != nil {
		t.Error("a nil body is no longer nil, so that Send does not refuse it")
	}
}

func TestPrependReportsTheFirstFailedWrite(t *testing.T) {
	full := errors.New("full")
	// A body that goes on after a write has failed, and says nothing of it.
	careless := writerTo(func(w io.Writer) (int64, error) {
		for range 3 {
			io.WriteString(w, message)
		}
		return 0, nil
	})
	for limit := range len(field + message) {
		w := &limited{left: limit, err: full}
		n, err := smtpapi.Prepend(orders, careless).WriteTo(w)
		if !errors.Is(err, full) || n != int64(limit) || w.String() != (field + message)[:limit] {
			t.Errorf("limit %d: %d, %v: %q", limit, n, err, w.String())
		}
	}
	w := &limited{left: len(field) + 3} // no error, but fewer octets: against io.Writer's rules
	if _, err := smtpapi.Prepend(orders, careless).WriteTo(w); err != io.ErrShortWrite {
		t.Errorf("short write: %v", err)
	}
}

type limited struct {
	strings.Builder
	left int
	err  error
}

func (l *limited) Write(b []byte) (int, error) {
	if len(b) <= l.left {
		l.left -= len(b)
		return l.Builder.Write(b)
	}
	n, _ := l.Builder.Write(b[:l.left])
	l.left = 1 << 20 // whoever goes on writing is heard
	return n, l.err
}

func TestPrependIsNotChangedByLaterChangesOfTheHeader(t *testing.T) {
	h := smtpapi.Header{Category: []string{"orders"}}
	body := smtpapi.Prepend(h, smtprelay.Bytes([]byte(message)))
	h.Category[0] = "other"
	var b strings.Builder
	if _, err := body.WriteTo(&b); err != nil || b.String() != field+message {
		t.Errorf("%v: %q", err, b.String())
	}
}

// A message with a field is sent as any other, tried again where the relay asks for that, and arrives whole.
func TestPrependedMessageArrivesWholeAfterAnotherTry(t *testing.T) {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	send := func(h smtpapi.Header, body io.WriterTo) error {
		_, err := client.Send(context.Background(), smtprelay.Message{
			From: "shop@example.com", To: []string{"shop@example.com"}, Body: smtpapi.Prepend(h, body),
		})
		return err
	}
	closing := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: "421 4.3.2 closing", Drop: true})
	if err := send(orders, smtprelay.Bytes([]byte(message))); err != nil {
		t.Error(err)
	}
	if err := send(orders, smtprelay.Reader(strings.NewReader(message))); err != nil {
		t.Error(err)
	}
	for _, h := range []smtpapi.Header{{ASMGroupID: -1}, orders} {
		body := message
		if h.ASMGroupID == 0 {
			body = ""
		}
		for _, b := range []io.WriterTo{smtprelay.Bytes([]byte(body)), smtprelay.Reader(strings.NewReader(body))} {
			var e *smtprelay.Error
			if err := send(h, b); !errors.As(err, &e) || e.Outcome != smtprelay.NotAccepted {
				t.Errorf("%v, %q: got %v", h, body, err)
			}
		}
	}
	if closing.Hits() == 0 {
		t.Error("no try failed")
	}
	if n := len(relay.Messages()); n != 2 {
		t.Errorf("%d messages, want 2", n)
	}
	for _, m := range relay.Messages() {
		if got := string(m.Body); got != field+message {
			t.Errorf("got %q", got)
		}
	}
}

// A header of substitutions for 1,000 recipients arrives with the JSON that went in, by DATA and in chunks.
func TestSubstitutionsForAThousandRecipientsArriveAsTheyWere(t *testing.T) {
	h := smtpapi.Header{To: addresses(1000), Sub: map[string][]string{}}
	want := map[string]any{"to": h.To, "sub": h.Sub}
	for i := range h.To {
		h.Sub["-name-"] = append(h.Sub["-name-"], fmt.Sprintf("Zoë %d \U0001F600", i))
		h.Sub["-text-"] = append(h.Sub["-text-"], "\r\n.\r\n\"}"+strings.Repeat(" long ", i%160))
	}
	for _, chunking := range []bool{false, true} {
		relay := smtptest.New(t, func(s *smtptest.Server) { s.Chunking = chunking })
		client := relay.Client(t, func(c *smtprelay.Config) { c.Chunking = chunking })
		if _, err := client.Send(t.Context(), smtprelay.Message{
			From: "shop@example.com", To: []string{"shop@example.com"}, Body: smtpapi.Prepend(h, smtprelay.Bytes([]byte(message))),
		}); err != nil {
			t.Fatal(err)
		}
		got := relay.Messages()[0]
		if got.Chunked != chunking {
			t.Errorf("chunked: %v, want %v", got.Chunked, chunking)
		}
		field, ok := bytes.CutSuffix(got.Body, []byte(message))
		if !ok {
			t.Fatal("the message after the field is another one")
		}
		wanted, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var a, b any
		if err := errors.Join(json.Unmarshal([]byte(checkForm(t, field)), &a), json.Unmarshal(wanted, &b)); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(a, b) {
			t.Error("the relay has got another JSON")
		}
	}
}
