// How addresses in header form, and messages that have an envelope, become a Message.
package test

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
)

func TestHeaderAddressesBecomeBareAddresses(t *testing.T) {
	for _, tt := range []struct {
		why  string
		list []string
		want []string
		says string // in the error; "" means that there is none
	}{
		{"a bare one", []string{"ann@example.org"}, []string{"ann@example.org"}, ""},
		{"brackets", []string{"<ann@example.org>"}, []string{"ann@example.org"}, ""},
		{"a name", []string{"Ann Smith <ann@example.org>"}, []string{"ann@example.org"}, ""},
		{"a name with a comma in it", []string{`"Smith, Ann" <ann@example.org>, bob@example.org`}, []string{"ann@example.org", "bob@example.org"}, ""},
		{"several headers, one of them empty", []string{"ann@example.org", "", " ", "Bob <bob@example.org>"}, []string{"ann@example.org", "bob@example.org"}, ""},
		{"a group", []string{"Team: ann@example.org, Bob <bob@example.org>;"}, []string{"ann@example.org", "bob@example.org"}, ""},
		{"a local part in quotes keeps them", []string{`<"ann smith"@example.org>`}, []string{`"ann smith"@example.org`}, ""},
		{"without quotes it would be two addresses", []string{`"eve@evil.example,ann"@example.org`}, []string{`"eve@evil.example,ann"@example.org`}, ""},
		{"a name in an unknown character set", []string{"=?x-mystery?Q?Ann?= <ann@example.org>"}, []string{"ann@example.org"}, ""},
		{"an address that is not ASCII", []string{"Ännchen <ännchen@example.org>"}, []string{"ännchen@example.org"}, ""},
		{"the same twice", []string{"a@x.example, a@x.example"}, []string{"a@x.example", "a@x.example"}, ""},
		{"nothing", nil, nil, ""},
		{"a name alone", []string{"ann@example.org", "Ann Smith"}, nil, `"Ann Smith"`},
		{"a line end that would be another command", []string{"ann@example.org>\r\nRCPT TO:<eve@evil.example"}, nil, `\r\n`},
		{"several mistakes", []string{"x", "y"}, nil, `"y"`},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got, err := smtprelay.ParseAddresses(tt.list...)
			if tt.says == "" {
				if err != nil || !reflect.DeepEqual(got, tt.want) {
					t.Errorf("got %q, %v, want %q", got, err, tt.want)
				}
				return
			}
			if e, ok := errors.AsType[*smtprelay.Error](err); !ok || e.Op != smtprelay.OpCheck || got != nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %q, %v, want an error that contains %s", got, err, tt.says)
			}
		})
	}
}

// goMail has the methods of go-mail's *mail.Msg; the test with a real one is in bench.
type goMail struct {
	from    string
	to      []string
	fromErr error
	toErr   error
}

func (m *goMail) WriteTo(w io.Writer) (int64, error) {
	n, err := io.WriteString(w, "Subject: hi\r\n\r\nhi\r\n")
	return int64(n), err
}
func (m *goMail) GetSender(bool) (string, error)   { return m.from, m.fromErr }
func (m *goMail) GetRecipients() ([]string, error) { return m.to, m.toErr }

func TestMessageTakesTheEnvelopeOfAGoMailMessage(t *testing.T) {
	relay := newRelay(t)
	m, err := smtprelay.MessageOf(&goMail{from: "<shop@example.com>", to: []string{"<ann@example.org>", "bob@example.org", "<ann@example.org>"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newClient(t, relay.Config()).Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	got := relay.Messages()
	if len(got) != 1 || got[0].From != "shop@example.com" || fmt.Sprint(got[0].To) != "[ann@example.org bob@example.org]" || !strings.HasPrefix(string(got[0].Body), "Subject: hi") {
		t.Errorf("the relay got %+v", got)
	}
}

func TestMessageWithoutAnEnvelopeIsAnError(t *testing.T) {
	none := errors.New("there is none")
	for why, m := range map[string]*goMail{
		"no sender":     {fromErr: none, to: []string{"a@x.example"}},
		"no recipients": {from: "a@x.example", toErr: none},
	} {
		_, err := smtprelay.MessageOf(m)
		if e, ok := errors.AsType[*smtprelay.Error](err); !ok || !errors.Is(err, none) || e.Outcome != smtprelay.NotAccepted {
			t.Errorf("%s: got %v, want the message's own error", why, err)
		}
	}
}

// If a message's methods use ParseAddresses, they return an error of ours, which names the step once.
func TestMessageWithABadAddressNamesTheStepOnce(t *testing.T) {
	_, bad := smtprelay.ParseAddresses("ann@@example.org")
	_, err := smtprelay.MessageOf(&goMail{from: "a@x.example", toErr: bad})
	if err == nil || err.Error() != bad.Error() || smtprelay.ShouldRetry(err) {
		t.Errorf("got %v, want %v", err, bad)
	}
}
