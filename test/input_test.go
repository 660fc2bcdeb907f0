// Mistakes of the caller: reported before anything is written, without touching a connection.
package test

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A mistake of the caller is reported before anything is written, leaves the connections alone, and says what is wrong with what.
func TestBadInputIsToldBeforeAnythingIsWritten(t *testing.T) {
	good := func() smtprelay.Message {
		return smtprelay.Message{
			From: "shop@example.com",
			To:   []string{"ann@example.org"},
			Body: smtprelay.Bytes([]byte("Subject: hello\r\n\r\nHello.\r\n")),
		}
	}
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()

	for _, test := range []struct {
		name string
		ctx  context.Context // nil means the test's
		edit func(*smtprelay.Message)
		op   smtprelay.Op
		is   error    // what errors.Is finds; nil means nothing special
		says []string // in the text of the error
		why  string
	}{
		{
			name: "LF in the reverse-path",
			edit: func(m *smtprelay.Message) { m.From = "shop@example.com>\nRCPT TO:<eve@example.net" },
			op:   smtprelay.OpCheck,
			says: []string{"From", "control character"},
			why:  "a separate line would be a separate command",
		},
		{
			name: "CR in the reverse-path",
			edit: func(m *smtprelay.Message) { m.From = "shop@example.com\r" },
			op:   smtprelay.OpCheck,
			says: []string{"From", "control character"},
			why:  "some servers end a line at a bare CR",
		},
		{
			name: "NUL in the reverse-path",
			edit: func(m *smtprelay.Message) { m.From = "shop\x00@example.com" },
			op:   smtprelay.OpCheck,
			says: []string{"From", "control character"},
			why:  "servers written in C end a string there",
		},
		{
			name: "CR LF in a forward-path",
			edit: func(m *smtprelay.Message) { m.To = []string{"ann@example.org", "bob@example.org>\r\nDATA"} },
			op:   smtprelay.OpCheck,
			says: []string{"To", "bob@example.org", "control character"},
			why:  "the caller must know which of many recipients it was",
		},
		{
			name: "NUL in a forward-path",
			edit: func(m *smtprelay.Message) { m.To = []string{"ann@example.org\x00"} },
			op:   smtprelay.OpCheck,
			says: []string{"To", "ann@example.org", "control character"},
			why:  "as in the reverse-path",
		},
		{
			name: "no recipients",
			edit: func(m *smtprelay.Message) { m.To = nil },
			op:   smtprelay.OpCheck,
			says: []string{"To", "recipient"},
			why:  "a message without recipients is a bug of the caller, not a success",
		},
		{
			name: "empty recipient",
			edit: func(m *smtprelay.Message) { m.To = []string{""} },
			op:   smtprelay.OpCheck,
			says: []string{"To", "empty"},
			why:  "the null path is for the sender only",
		},
		{
			name: "display name in the reverse-path",
			edit: func(m *smtprelay.Message) { m.From = "The Shop <shop@example.com>" },
			op:   smtprelay.OpCheck,
			says: []string{"From", "The Shop <shop@example.com>", "display name"},
			why:  "the most common mistake: a header's address in the envelope",
		},
		{
			name: "angle brackets around a forward-path",
			edit: func(m *smtprelay.Message) { m.To = []string{"<ann@example.org>"} },
			op:   smtprelay.OpCheck,
			says: []string{"To", "<ann@example.org>", "angle brackets"},
			why:  "the brackets are the protocol's",
		},
		{
			name: "no at sign",
			edit: func(m *smtprelay.Message) { m.To = []string{"ann"} },
			op:   smtprelay.OpCheck,
			says: []string{"To", "ann", "no @"},
			why:  "a relay has no local users to complete the address for",
		},
		{
			name: "space in a forward-path",
			edit: func(m *smtprelay.Message) { m.To = []string{"ann smith@example.org"} },
			op:   smtprelay.OpCheck,
			says: []string{"To", "ann smith@example.org", "' '"},
			why:  "what follows the space would be read as a parameter",
		},
		{
			name: "nil body",
			edit: func(m *smtprelay.Message) { m.Body = nil },
			op:   smtprelay.OpCheck,
			says: []string{"Body", "nil"},
			why:  "many relays accept an empty message: better to report it",
		},
		{
			name: "LF in a parameter of MAIL",
			edit: func(m *smtprelay.Message) { m.MailOptions = &smtprelay.MailOptions{Size: 10, EnvelopeID: "a\nb"} },
			op:   smtprelay.OpCheck,
			says: []string{"EnvelopeID"},
			why:  "a parameter is on the command line too",
		},
		{
			name: "options for an address that is not a recipient",
			edit: func(m *smtprelay.Message) {
				m.RcptOptions = map[string]*smtprelay.RcptOptions{"bob@example.org": {}}
			},
			op:   smtprelay.OpCheck,
			says: []string{"RcptOptions", "bob@example.org"},
			why:  "a misspelt key would lose the options silently",
		},
		{
			name: "recipient in UTF-8",
			edit: func(m *smtprelay.Message) { m.To = []string{"jürgen@example.org"} },
			says: []string{"jürgen@example.org", "SMTPUTF8"},
			why:  "this relay does not offer SMTPUTF8, so it must not be sent such an address (RFC 6531, 3.2)",
		},
		{
			name: "body larger than the relay accepts",
			edit: func(m *smtprelay.Message) { m.Body = smtprelay.Bytes(make([]byte, relaySize+1)) },
			says: []string{"SIZE"},
			why:  "the relay's EHLO says so: no need to send it (RFC 1870, 6.1)",
		},
		{
			name: "context that has ended",
			ctx:  cancelled,
			edit: func(*smtprelay.Message) {},
			is:   context.Canceled,
			why:  "the caller has gone",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			relay := newRelay(t, func(s *smtptest.Server) { s.MaxSize = relaySize })
			client := newClient(t, configOf(relay))
			if _, err := client.Send(t.Context(), good()); err != nil {
				t.Fatalf("a good message first: %v", err)
			}
			m := good()
			test.edit(&m)
			ctx := t.Context()
			if test.ctx != nil {
				ctx = test.ctx
			}
			_, err := client.Send(ctx, m)
			checkRefusedLocally(t, err, test.op, test.is, test.says, test.why)
			if _, err := client.Send(t.Context(), good()); err != nil {
				t.Errorf("a good message afterwards: %v", err)
			}
			want(t, "connections opened", len(relay.Conns()), 1)
			got := relay.Conns()[0].Commands
			wanted := map[string]int{"EHLO": 2, "STARTTLS": 1, "AUTH": 1, "MAIL": 2, "RCPT": 2, "DATA": 2}
			if !maps.Equal(got, wanted) {
				t.Errorf("the relay got %v; want %v, those of the good messages: %s", got, wanted, test.why)
			}
		})
	}
}

// relaySize is the SIZE that the relay of these tests announces.
const relaySize = 100_000

func checkRefusedLocally(t *testing.T, err error, op smtprelay.Op, is error, says []string, why string) {
	t.Helper()
	e, ok := errors.AsType[*smtprelay.Error](err)
	if !ok {
		t.Fatalf("got %T %v, want an *Error: %s", err, err, why)
	}
	t.Logf("%v", err)
	if e.Outcome != smtprelay.NotAccepted || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
		t.Errorf("outcome %v, want not accepted: %v", e.Outcome, err)
	}
	if op != "" && e.Op != op {
		t.Errorf("op %q, want %q: %v", e.Op, op, err)
	}
	if is == nil && e.Temporary() {
		t.Errorf("temporary, but the same message will always fail: %v", err)
	}
	if is != nil && !errors.Is(err, is) {
		t.Errorf("errors.Is does not find %v in %v", is, err)
	}
	for _, words := range says {
		if !strings.Contains(err.Error(), words) {
			t.Errorf("%q does not contain %q: %s", err, words, why)
		}
	}
	if strings.ContainsAny(err.Error(), "\r\n\x00") {
		t.Errorf("%q has control characters, which a log would contain too", err)
	}
}

func TestNoConnectionIsOpenedForBadInput(t *testing.T) {
	relay := newRelay(t)
	client := newClient(t, configOf(relay))
	for _, m := range []smtprelay.Message{
		{},
		{From: "a@example.com\n", To: []string{"b@example.org"}, Body: smtprelay.Bytes([]byte("x"))},
		{From: "a@example.com", To: []string{"b@example.org"}},
	} {
		if _, err := client.Send(t.Context(), m); smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
			t.Errorf("%+v: %v", m, err)
		}
	}
	want(t, "connections opened", len(relay.Conns()), 0)
}

func TestClosedClientReturnsErrClosed(t *testing.T) {
	relay := newRelay(t)
	client := newClient(t, configOf(relay))
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	m := smtprelay.Message{From: "a@example.com", To: []string{"b@example.org"}, Body: smtprelay.Bytes([]byte("x"))}
	_, err := client.Send(t.Context(), m)
	checkRefusedLocally(t, err, "", smtprelay.ErrClosed, []string{"closed"}, "errors.Is(err, ErrClosed) is how a caller knows")
	if err := client.Ping(t.Context()); !errors.Is(err, smtprelay.ErrClosed) {
		t.Errorf("Ping: %v, want ErrClosed", err)
	}
	if err := client.SendMail(m.From, m.To, []byte("x")); !errors.Is(err, smtprelay.ErrClosed) {
		t.Errorf("SendMail: %v, want ErrClosed", err)
	}
	for r := range client.SendAll(t.Context(), slices.Values([]smtprelay.Message{m, m})) {
		if !errors.Is(r.Err, smtprelay.ErrClosed) {
			t.Errorf("SendAll: %v, want ErrClosed", r.Err)
		}
	}
	want(t, "connections opened", len(relay.Conns()), 0)
}

// If the envelope is wrong the body is not even opened: it may be a file, or a stream that can be read once.
func TestBodyIsNotTouchedIfTheEnvelopeIsInvalid(t *testing.T) {
	client := newClient(t, newRelay(t).Config())
	_, err := client.Send(t.Context(), smtprelay.Message{
		From: "a@example.com",
		To:   []string{"not an address"},
		Body: smtprelay.Reader(readerFunc(func([]byte) (int, error) {
			t.Error("the body was read")
			return 0, io.EOF
		})),
	})
	if smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
		t.Errorf("%v, want not accepted", err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestNewReportsAllMistakesAtOnce(t *testing.T) {
	_, err := smtprelay.New(smtprelay.Config{
		Addr:      "smtp.example.com", // no port
		Password:  "secret-key",
		LocalName: "not a name\r\n",
		Limits:    smtprelay.Limits{MaxConns: -1},
	})
	e, ok := errors.AsType[*smtprelay.Error](err)
	if !ok {
		t.Fatalf("got %v, want an *Error", err)
	}
	t.Log(err)
	if e.Op != smtprelay.OpConfig || e.Temporary() {
		t.Errorf("op %q, temporary %v; want the configuration, permanent", e.Op, e.Temporary())
	}
	for _, field := range []string{"Addr", "LocalName", "MaxConns"} {
		if !strings.Contains(err.Error(), field) {
			t.Errorf("%q does not name %s", err, field)
		}
	}
	if strings.Contains(err.Error(), "secret-key") {
		t.Errorf("%q contains the key", err)
	}
}
