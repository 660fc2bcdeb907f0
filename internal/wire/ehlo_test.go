package wire

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// The lists that relays were seen to give, as the text of their replies. The first line is theirs to fill.
var ehloLists = []struct {
	relay, text string
	want        Extensions
}{
	{"SendGrid",
		"smtp.sendgrid.net\n8BITMIME\nPIPELINING\nSIZE 31457280\nSTARTTLS\nAUTH PLAIN LOGIN\nAUTH=PLAIN LOGIN",
		Extensions{Keywords: []string{"8BITMIME", "PIPELINING", "SIZE", "STARTTLS", "AUTH"}, Size: 31457280, Auth: []string{"PLAIN", "LOGIN"}}},
	{"Mailgun",
		"smtp-out-n01.prod.us-east-1.postgun.com\nAUTH PLAIN LOGIN\nSIZE 52428800\n8BITMIME\nSMTPUTF8\nPIPELINING\nSTARTTLS",
		Extensions{Keywords: []string{"AUTH", "SIZE", "8BITMIME", "SMTPUTF8", "PIPELINING", "STARTTLS"}, Size: 52428800, Auth: []string{"PLAIN", "LOGIN"}}},
	{"SparkPost, without SIZE",
		"smtp.sparkpostmail.com says EHLO to 192.0.2.1\nPIPELINING\nAUTH LOGIN PLAIN\nAUTH=LOGIN PLAIN\nENHANCEDSTATUSCODES\nSTARTTLS\n8BITMIME",
		Extensions{Keywords: []string{"PIPELINING", "AUTH", "ENHANCEDSTATUSCODES", "STARTTLS", "8BITMIME"}, Auth: []string{"LOGIN", "PLAIN"}}},
	{"Mailtrap",
		"smtp.mailtrap.io\nSIZE 5242880\nPIPELINING\nENHANCEDSTATUSCODES\n8BITMIME\nDSN\nAUTH PLAIN LOGIN CRAM-MD5\nSTARTTLS",
		Extensions{Keywords: []string{"SIZE", "PIPELINING", "ENHANCEDSTATUSCODES", "8BITMIME", "DSN", "AUTH", "STARTTLS"}, Size: 5242880,
			Auth: []string{"PLAIN", "LOGIN", "CRAM-MD5"}}},
	{"Gmail",
		"smtp.gmail.com at your service, [192.0.2.1]\nSIZE 35882577\n8BITMIME\nAUTH LOGIN PLAIN XOAUTH2 PLAIN-CLIENTTOKEN\nENHANCEDSTATUSCODES\nPIPELINING\nCHUNKING\nSMTPUTF8",
		Extensions{Keywords: []string{"SIZE", "8BITMIME", "AUTH", "ENHANCEDSTATUSCODES", "PIPELINING", "CHUNKING", "SMTPUTF8"}, Size: 35882577,
			Auth: []string{"LOGIN", "PLAIN", "XOAUTH2", "PLAIN-CLIENTTOKEN"}}},
	{"Microsoft 365, which gives AUTH only after TLS",
		"AM0PR01CA0001.outlook.office365.com Hello [192.0.2.1]\nSIZE 157286400\nPIPELINING\nDSN\nENHANCEDSTATUSCODES\nSTARTTLS\n8BITMIME\nBINARYMIME\nCHUNKING\nSMTPUTF8",
		Extensions{Keywords: []string{"SIZE", "PIPELINING", "DSN", "ENHANCEDSTATUSCODES", "STARTTLS", "8BITMIME", "BINARYMIME", "CHUNKING", "SMTPUTF8"}, Size: 157286400}},
	{"Postfix",
		"relay.example\nPIPELINING\nSIZE 10240000\nVRFY\nETRN\nSTARTTLS\nAUTH PLAIN LOGIN\nENHANCEDSTATUSCODES\n8BITMIME\nDSN\nSMTPUTF8\nCHUNKING",
		Extensions{Keywords: []string{"PIPELINING", "SIZE", "VRFY", "ETRN", "STARTTLS", "AUTH", "ENHANCEDSTATUSCODES", "8BITMIME", "DSN", "SMTPUTF8", "CHUNKING"},
			Size: 10240000, Auth: []string{"PLAIN", "LOGIN"}}},
	{"Exim",
		"relay.example Hello client.example [127.0.0.1]\nSIZE 52428800\nLIMITS MAILMAX=1000 RCPTMAX=50000\n8BITMIME\nPIPELINING\nCHUNKING\nHELP",
		Extensions{Keywords: []string{"SIZE", "LIMITS", "8BITMIME", "PIPELINING", "CHUNKING", "HELP"}, Size: 52428800,
			Limits: Limits{MailMax: 1000, RcptMax: 50000}}},
}

func TestListsOfRealRelaysAreRead(t *testing.T) {
	for _, tt := range ehloLists {
		t.Run(tt.relay, func(t *testing.T) {
			if got := ParseEHLO(tt.text); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

func TestEHLOIsReadWithForbearance(t *testing.T) {
	for _, tt := range []struct {
		why, text string
		want      Extensions
	}{
		{"the greeting offers nothing, whatever it says", "PIPELINING", Extensions{}},
		{"no text at all", "", Extensions{}},
		{"keywords are the same in any case (RFC 5321, 2.4)", "hi\npipelining\nStartTls", Extensions{Keywords: []string{"PIPELINING", "STARTTLS"}}},
		{"empty lines say nothing", "hi\n\n  \nDSN\n", Extensions{Keywords: []string{"DSN"}}},
		{"a keyword counts once", "hi\nDSN\ndsn", Extensions{Keywords: []string{"DSN"}}},
		{"unknown ones are kept with the others", "hi\nX-EXPS GSSAPI\nXCLIENT NAME ADDR", Extensions{Keywords: []string{"X-EXPS", "XCLIENT"}}},
		{"spaces and tabs around parameters", "hi\n SIZE \t 1000 ", Extensions{Keywords: []string{"SIZE"}, Size: 1000}},
		{"letters beyond ASCII are no other way to write it", "hi\nP\u0131PEL\u0131N\u0131NG\n\u017fIZE 5",
			Extensions{Keywords: []string{"P\u0131PEL\u0131N\u0131NG", "\u017fIZE"}}},

		{"SIZE without a number means no known limit", "hi\nSIZE", Extensions{Keywords: []string{"SIZE"}}},
		{"SIZE 0 too (RFC 1870, 4)", "hi\nSIZE 0", Extensions{Keywords: []string{"SIZE"}}},
		{"SIZE of what is no number too", "hi\nSIZE big", Extensions{Keywords: []string{"SIZE"}}},
		{"a negative SIZE too", "hi\nSIZE -1", Extensions{Keywords: []string{"SIZE"}}},
		{"a SIZE of more than an int64 too", "hi\nSIZE 99999999999999999999", Extensions{Keywords: []string{"SIZE"}}},

		{"mechanisms are in upper case", "hi\nAUTH plain Login", Extensions{Keywords: []string{"AUTH"}, Auth: []string{"PLAIN", "LOGIN"}}},
		{"the old form alone (before RFC 2554)", "hi\nAUTH=LOGIN PLAIN", Extensions{Keywords: []string{"AUTH"}, Auth: []string{"LOGIN", "PLAIN"}}},
		{"the old form adds what the new one lacks", "hi\nAUTH PLAIN\nAUTH=LOGIN PLAIN", Extensions{Keywords: []string{"AUTH"}, Auth: []string{"PLAIN", "LOGIN"}}},
		{"AUTH without mechanisms", "hi\nAUTH\nAUTH=", Extensions{Keywords: []string{"AUTH"}}},

		{"all three LIMITS (RFC 9422, 4)", "hi\nLIMITS MAILMAX=100 RCPTMAX=50 RCPTDOMAINMAX=1",
			Extensions{Keywords: []string{"LIMITS"}, Limits: Limits{100, 50, 1}}},
		{"names of limits are the same in any case", "hi\nLIMITS mailmax=7", Extensions{Keywords: []string{"LIMITS"}, Limits: Limits{MailMax: 7}}},
		{"a broken value is ignored, the others are not (RFC 9422, 3.7)", "hi\nLIMITS MAILMAX=many RCPTMAX=5",
			Extensions{Keywords: []string{"LIMITS"}, Limits: Limits{RcptMax: 5}}},
		{"so is an unknown name", "hi\nLIMITS CONNMAX=3 RCPTMAX=5", Extensions{Keywords: []string{"LIMITS"}, Limits: Limits{RcptMax: 5}}},
		{"so is a name without value", "hi\nLIMITS MAILMAX RCPTMAX=5", Extensions{Keywords: []string{"LIMITS"}, Limits: Limits{RcptMax: 5}}},
		{"0 is no limit that one could keep", "hi\nLIMITS MAILMAX=0", Extensions{Keywords: []string{"LIMITS"}}},
		{"nor is a negative one", "hi\nLIMITS MAILMAX=-1", Extensions{Keywords: []string{"LIMITS"}}},
		{"nor is one with a sign", "hi\nLIMITS MAILMAX=+5", Extensions{Keywords: []string{"LIMITS"}}},
		{"a semicolon, which has no place here: all are ignored (RFC 9422, 3.7)", "hi\nLIMITS RCPTMAX=5 MAILMAX=100;RCPTDOMAINMAX=1",
			Extensions{Keywords: []string{"LIMITS"}}},
		{"so they are for a value without name", "hi\nLIMITS RCPTMAX=5 =7", Extensions{Keywords: []string{"LIMITS"}}},
		{"and for a name with an equals sign and no value", "hi\nLIMITS RCPTMAX=5 MAILMAX=", Extensions{Keywords: []string{"LIMITS"}}},
		{"and for a comma between them", "hi\nLIMITS MAILMAX=5 , RCPTMAX=7", Extensions{Keywords: []string{"LIMITS"}}},
		{"six digits are the most", "hi\nLIMITS MAILMAX=999999 RCPTMAX=1000000", Extensions{Keywords: []string{"LIMITS"}, Limits: Limits{MailMax: 999999}}},

		{"the shortest time of DELIVERBY (RFC 2852, 3)", "hi\nDELIVERBY 240", Extensions{Keywords: []string{"DELIVERBY"}, DeliverBy: 240}},
		{"DELIVERBY without one", "hi\nDELIVERBY", Extensions{Keywords: []string{"DELIVERBY"}}},
		{"DELIVERBY of what is no number", "hi\nDELIVERBY soon", Extensions{Keywords: []string{"DELIVERBY"}}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			if got := ParseEHLO(tt.text); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("%q: got %+v, want %+v", tt.text, got, tt.want)
			}
		})
	}
}

func TestHasTellsWhatIsOffered(t *testing.T) {
	e := ParseEHLO("hi\nPIPELINING\nSIZE 5")
	if !e.Has("SIZE") || !e.Has("PIPELINING") {
		t.Errorf("%v: SIZE and PIPELINING are offered", e.Keywords)
	}
	if e.Has("PIPE") || e.Has("") || e.Has("5") {
		t.Errorf("%v: offers what it does not", e.Keywords)
	}
}

func TestKeywordsAndMechanismsBeyondTheBoundAreLeftOut(t *testing.T) {
	var text strings.Builder
	text.WriteString("hi\nPIPELINING\nAUTH PLAIN")
	for i := range 10_000 {
		fmt.Fprintf(&text, " MECHANISM-%d", i)
	}
	text.WriteString("\n" + strings.Repeat("X", MaxWordLen+1) + "\n" + strings.Repeat("Y", MaxWordLen))
	for i := range 10_000 {
		fmt.Fprintf(&text, "\nX-KEYWORD-%d with some parameters", i)
	}
	text.WriteString("\nSIZE 5")
	e := ParseEHLO(text.String())
	if len(e.Keywords) != MaxWords || !e.Has("PIPELINING") || !e.Has("X-KEYWORD-0") {
		t.Errorf("got %d keywords, want the first %d", len(e.Keywords), MaxWords)
	}
	if len(e.Auth) != MaxWords || e.Auth[0] != "PLAIN" || e.Auth[MaxWords-1] != fmt.Sprintf("MECHANISM-%d", MaxWords-2) {
		t.Errorf("got %d mechanisms, want the first %d", len(e.Auth), MaxWords)
	}
	if e.Has(strings.Repeat("X", MaxWordLen+1)) || !e.Has(strings.Repeat("Y", MaxWordLen)) {
		t.Errorf("got %q, want keywords of up to %d octets", e.Keywords[:4], MaxWordLen)
	}
	if e.Size != 5 {
		t.Errorf("got SIZE %d, want 5: what a keyword means is read wherever it stands", e.Size)
	}
}

func TestListTooLongToKeepEndsWithAWholeLine(t *testing.T) {
	var reply strings.Builder
	reply.WriteString("250-hi\r\n250-PIPELINING\r\n")
	for range 1000 {
		reply.WriteString("250-SIZE 123456789012\r\n")
	}
	reply.WriteString("250 CHUNKING\r\n")
	bytes := allocated(func() {
		r, err := NewReplyReader(strings.NewReader(reply.String())).ReadLong()
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Text) > MaxLongText || len(r.Text) < MaxLongText-len("SIZE 123456789012\n") {
			t.Errorf("%d octets are kept, want %d, less a part of a line", len(r.Text), MaxLongText)
		}
		if e := ParseEHLO(r.Text); e.Size != 123456789012 || !e.Has("PIPELINING") {
			t.Errorf("got %+v, want what the whole lines say", e)
		}
	})
	if bytes > 12*MaxReply {
		t.Errorf("%d bytes were allocated, more than %d", bytes, 12*MaxReply)
	}
}

// encodeEHLO writes e as a relay does, and returns the text of the reply.
func encodeEHLO(e Extensions) string {
	var b strings.Builder
	b.WriteString("relay.example")
	for _, keyword := range e.Keywords {
		b.WriteString("\n" + keyword)
		switch keyword {
		case "SIZE":
			fmt.Fprintf(&b, " %d", e.Size)
		case "AUTH":
			fmt.Fprintf(&b, " %s", strings.Join(e.Auth, " "))
		case "LIMITS":
			fmt.Fprintf(&b, " MAILMAX=%d RCPTMAX=%d RCPTDOMAINMAX=%d", e.Limits.MailMax, e.Limits.RcptMax, e.Limits.RcptDomainMax)
		case "DELIVERBY":
			fmt.Fprintf(&b, " %d", e.DeliverBy)
		}
	}
	return b.String()
}

// FuzzParseEHLO holds the parser to what it promises of any text, and to itself. What is offered is decided once more here,
// by looking at the first word of each line.
func FuzzParseEHLO(f *testing.F) {
	for _, list := range ehloLists {
		f.Add(list.text)
	}
	f.Add("hi\nAUTH=plain\nLIMITS MAILMAX=0 x RCPTMAX=999999\nDELIVERBY 1\n\nSIZE\tbig")
	f.Add("hi\n\u017fize 5\nAUTH=\nAUTH = a")
	f.Fuzz(func(t *testing.T, text string) {
		e := ParseEHLO(text)
		if got := ParseEHLO(encodeEHLO(e)); !reflect.DeepEqual(got, e) {
			t.Errorf("%q: got %+v, written and parsed again %+v", text, e, got)
		}
		if e.Size < 0 || e.DeliverBy < 0 || min(e.Limits.MailMax, e.Limits.RcptMax, e.Limits.RcptDomainMax) < 0 ||
			max(e.Limits.MailMax, e.Limits.RcptMax, e.Limits.RcptDomainMax) > 999999 {
			t.Errorf("%q: a number is out of bounds in %+v", text, e)
		}
		for _, words := range [][]string{e.Keywords, e.Auth} {
			for i, word := range words {
				if word == "" || strings.ContainsFunc(word, func(r rune) bool { return r == ' ' || 'a' <= r && r <= 'z' }) {
					t.Errorf("%q: the word %q", text, word)
				}
				if slices.Contains(words[:i], word) {
					t.Errorf("%q: %s stands twice", text, word)
				}
			}
		}
		var offered []string
		for _, line := range strings.Split(text, "\n")[1:] {
			words := strings.Fields(line)
			if len(words) == 0 {
				continue
			}
			word := strings.Map(func(r rune) rune {
				if 'a' <= r && r <= 'z' {
					return r - 'a' + 'A'
				}
				return r
			}, words[0])
			if strings.HasPrefix(word, "AUTH=") {
				word = "AUTH"
			}
			if len(word) <= MaxWordLen && len(offered) < MaxWords && !slices.Contains(offered, word) {
				offered = append(offered, word)
			}
		}
		if !slices.Equal(e.Keywords, offered) {
			t.Errorf("%q: got keywords %v, want %v", text, e.Keywords, offered)
		}
	})
}
