package smtprelay

// What a reply's code and text mean beyond its class, and the queue IDs in it.

import (
	"strings"
	"testing"
	"unicode"
)

func TestRepliesAreUnderstoodAsTheirRelaysMeanThem(t *testing.T) {
	for _, tt := range []struct {
		why  string
		op   Op
		r    Reply
		says []meaning
	}{
		{"421 before the first message", OpGreeting, Reply{Code: 421}, []meaning{tooManyConns}},
		{"421 to AUTH", OpAuth, Reply{Code: 421}, []meaning{tooManyConns}},
		{"421 to a message is about the connection", OpMail, Reply{Code: 421}, nil},
		{"Microsoft 365, at any step", OpEnd, Reply{Code: 432, EnhancedCode: EnhancedCode{4, 3, 2}}, []meaning{tooManyConns}},
		{"Mailtrap, to AUTH", OpAuth, Reply{535, EnhancedCode{5, 7, 8}, "Too many concurrent\nConnections"}, []meaning{tooManyConns, saysTooManyConns}},
		{"the words in reverse order", OpAuth, Reply{454, EnhancedCode{}, "connections: too many"}, []meaning{tooManyConns, saysTooManyConns}},
		{"wrong credentials", OpAuth, Reply{535, EnhancedCode{5, 7, 8}, "too many wrong passwords"}, nil},
		{"a positive greeting with these words", OpGreeting, Reply{220, EnhancedCode{}, "too many connections"}, nil},

		{"OpenSMTPD: another connection may carry the message", OpMail, Reply{452, EnhancedCode{4, 5, 3}, "Too many messages sent"}, []meaning{tooManyMessages}},
		{"the relay is full, on every connection", OpMail, Reply{Code: 452, EnhancedCode: EnhancedCode{4, 3, 1}}, nil},
		{"a permanent refusal is not about the connection", OpMail, Reply{Code: 550, EnhancedCode: EnhancedCode{5, 5, 3}}, nil},

		{"RFC 5321, 4.5.3.1.10; or a mailbox is full", OpRcpt, Reply{Code: 452}, []meaning{tooManyRcpts}},
		{"in the words of Postfix", OpRcpt, Reply{452, EnhancedCode{4, 5, 3}, "Error: too many recipients"}, []meaning{tooManyRcpts, numberOfRcpts}},
		{"by its text alone", OpRcpt, Reply{452, EnhancedCode{}, "Too many recipients"}, []meaning{tooManyRcpts, numberOfRcpts}},
		{"older relays", OpRcpt, Reply{Code: 552}, []meaning{tooManyRcpts}},
		{"a mailbox that is full", OpRcpt, Reply{452, EnhancedCode{4, 2, 2}, "Mailbox full"}, []meaning{tooManyRcpts}},
		{"RFC 3463, 3.6 under another code", OpRcpt, Reply{Code: 550, EnhancedCode: EnhancedCode{5, 5, 3}}, []meaning{tooManyRcpts, numberOfRcpts}},
		{"no such user", OpRcpt, Reply{550, EnhancedCode{5, 1, 1}, "no such user"}, nil},
		{"452 to the message is not about recipients", OpEnd, Reply{Code: 452}, nil},

		{"Gmail ends an idle connection", OpMail, Reply{451, EnhancedCode{4, 4, 2}, "Timeout - closing connection."}, []meaning{idleTooLong}},
		{"Amazon SES ends an idle connection", OpMail, Reply{451, EnhancedCode{}, "Timeout waiting for data from client."}, []meaning{idleTooLong}},
		{"another 451", OpMail, Reply{451, EnhancedCode{4, 7, 1}, "Timeout waiting for greylisting"}, nil},
		{"Amazon SES: messages come too fast", OpEnd, Reply{454, EnhancedCode{}, "Throttling failure: Maximum sending rate exceeded."}, []meaning{tooFast}},
		{"Amazon SES: daily quota, in nearly the same words", OpEnd, Reply{454, EnhancedCode{}, "Throttling failure: Daily message quota exceeded."}, []meaning{tooFast, quotaUsedUp}},
		{"Emailit", OpMail, Reply{452, EnhancedCode{4, 4, 5}, "Messages per second limit exceeded"}, []meaning{tooFast}},
		{"MailerSend", OpEnd, Reply{450, EnhancedCode{}, "Too many requests, please slow down. #MS-ST-G"}, []meaning{tooFast}},
		{"Google Workspace", OpMail, Reply{450, EnhancedCode{4, 2, 1}, "Peak SMTP relay limit exceeded"}, []meaning{tooFast}},
		{"Stalwart", OpMail, Reply{451, EnhancedCode{4, 4, 5}, "Rate limit exceeded"}, []meaning{tooFast}},
		{"mailcow", OpEnd, Reply{451, EnhancedCode{4, 7, 1}, "Ratelimit \"user\" exceeded"}, []meaning{tooFast}},
		{"Postfix", OpMail, Reply{450, EnhancedCode{4, 7, 1}, "Error: too much mail from 192.0.2.1"}, []meaning{tooFast}},
		{"Mailtrap", OpEnd, Reply{550, EnhancedCode{5, 7, 0}, "Requested action not taken: too many emails per second"}, []meaning{tooFast}},
		{"Gmail, of one mailbox", OpRcpt, Reply{450, EnhancedCode{4, 2, 1}, "The user you are trying to contact is receiving mail at a rate that prevents additional messages"}, []meaning{recipientBusy}},
		{"SendGrid: credits used up", OpMail, Reply{451, EnhancedCode{}, "Authentication failed: Maximum credits exceeded"}, []meaning{quotaUsedUp, loginForgotten}},
		{"SendGrid", OpMail, Reply{451, EnhancedCode{}, "You've exceeded your messaging limits"}, []meaning{quotaUsedUp}},
		{"Gmail: too many logins", OpAuth, Reply{454, EnhancedCode{4, 7, 0}, "Too many login attempts, please try again later"}, []meaning{tooManyLogins}},
		{"a session's limit, at MAIL", OpMail, Reply{452, EnhancedCode{4, 4, 5}, "Maximum number of messages per session exceeded"}, []meaning{tooManyMessages}},
		{"a session's limit of recipients", OpRcpt, Reply{452, EnhancedCode{4, 5, 3}, "Too many recipients in this session"}, []meaning{tooManyMessages, tooManyRcpts, numberOfRcpts}},
		{"the login is forgotten", OpMail, Reply{530, EnhancedCode{5, 7, 1}, "Authentication required"}, []meaning{loginForgotten}},
		{"the login is forgotten, by the text alone", OpMail, Reply{550, EnhancedCode{5, 7, 1}, "Please authenticate first"}, []meaning{loginForgotten}},
		{"the words later in the text", OpMail, Reply{451, EnhancedCode{}, "no timeout waiting here"}, nil},
	} {
		for m := tooManyConns; m <= recipientBusy; m++ {
			want := false
			for _, s := range tt.says {
				want = want || s == m
			}
			if got := tt.r.says(m, tt.op); got != want {
				t.Errorf("%s: %s: %v: meaning %d: got %v, want %v", tt.why, tt.op, tt.r, m, got, want)
			}
		}
	}
}

func TestQueueIDIsFound(t *testing.T) {
	for _, tt := range []struct{ relay, text, want string }{
		{"SendGrid", "Ok: queued as _bXzmsKbSfuMyZzZmB0wLg", "_bXzmsKbSfuMyZzZmB0wLg"},
		{"Postfix", "Ok: queued as 4Xyz1b2C3dz4fRt", "4Xyz1b2C3dz4fRt"},
		{"Postfix's short form", "Ok: queued as 9C0A31F", "9C0A31F"},
		{"Exim", "OK id=1tDabc-00000001Xyz-2pQr", "1tDabc-00000001Xyz-2pQr"},
		{"Amazon SES", "Ok 010001897a5b6c7d-0e1f2a3b-4c5d-6e7f-8a9b-0c1d2e3f4a5b-000000", "010001897a5b6c7d-0e1f2a3b-4c5d-6e7f-8a9b-0c1d2e3f4a5b-000000"},
		{"OpenSMTPD", "7f3a1b2c Message accepted for delivery", "7f3a1b2c"},
		{"Sendmail", "4AOEJ1x2012345 Message accepted for delivery", "4AOEJ1x2012345"},
		{"an identifier in brackets", "Message queued as <a.1@relay.example>", "a.1@relay.example"},
		{"the dot of the sentence is not part of it", "Queued as abc123.", "abc123"},
		{"the words in any case", "OK ID=x1", "x1"},
		{"go-smtp has no identifier", "OK: queued", ""},
		{"aiosmtpd", "OK", ""},
		{"smtp-server", "OK: message queued", ""},
		{"Gmail has a time first", "OK  1700000000 d2e1a72fcca58-12345.67 - gsmtp", "d2e1a72fcca58-12345.67"},
		{"Gmail's longest form", "OK DMARC:Quarantine 1731602923 d2e1a72fcca58-724771b0f2dsi1234567b3a.92 - gsmtp", "d2e1a72fcca58-724771b0f2dsi1234567b3a.92"},
		{"NetEase has a comma in it, and a time after it", "Mail OK queued as smtp8,DMCowABnb2uVr_5UnpG2Ag--.123S2 1453888371", "smtp8,DMCowABnb2uVr_5UnpG2Ag--.123S2"},
		{"a comma after the identifier is not part of it", "queued as 4F1D2, thank you", "4F1D2"},
		{"Microsoft 365", "<a.1@x.example> [InternalId=137, Hostname=AM0PR01.example] 9000 bytes in 0.2, 43.1 KB/sec Queued mail for delivery", "137"},
		{"Yandex", "OK: queued on mx1 as 4F1D2", "4F1D2"},
		{"Yandex with a host name", "Ok: queued on forward.mail.example 1601234567-AbCdEf", "1601234567-AbCdEf"},
		{"the same in other words", "queued at mx1.example with id: 4F1D2", "4F1D2"},
		{"queued for delivery", "Message queued for delivery as 4F1D2.", "4F1D2"},
		{"qmail", "ok 1453888371 qp 12345 server-5.example", "12345"},
		{"Cisco", "ok:  Message 12345678 accepted", "12345678"},
		{"Mimecast", "SmtpThread-8461391-149813@mta.example Received OK [c9xqHHqzM9aRw8mW9Nx5Yg.us133]", "c9xqHHqzM9aRw8mW9Nx5Yg.us133"},
		{"a relay after another", "from MTA(smtp:[127.0.0.1]:10025): 250 2.0.0 Ok: queued as 4Xyz1b2C3dz4fRt", "4Xyz1b2C3dz4fRt"},
		{"an identifier that begins with a hyphen", "Ok: queued as -bXzmsKbSfuMyZzZmB0wLg <relay>", "-bXzmsKbSfuMyZzZmB0wLg"},
		{"several lines", "thank you\nOk: queued as 4F1D2\nbye", "4F1D2"},
		{"a promise, no identifier", "queued as soon as possible", ""},
		{"a longer promise", "queued for delivery as soon as possible", ""},
		{"seconds", "Queued (0.123 seconds)", ""},
		{"an identifier of 128 octets", "queued as " + strings.Repeat("A", 128), strings.Repeat("A", 128)},
		{"a longer one is not an identifier", "queued as " + strings.Repeat("A", 129), ""},
		{"a longer one before a space", "queued as " + strings.Repeat("A", 129) + " x", ""},
		{"an identifier that is not ASCII", "queued as 4F1Dä", ""},
		{"Mailgun's words", "Great success", ""},
		{"id within a word", "sender identified, will be idle", ""},
		{"not an identifier", "queued as ???", ""},
		{"nothing", "", ""},
	} {
		t.Run(tt.relay, func(t *testing.T) {
			if got := findQueueID(tt.text); got != tt.want {
				t.Errorf("%q: got %q, want %q", tt.text, got, tt.want)
			}
		})
	}
}

func FuzzQueueID(f *testing.F) {
	for _, seed := range []string{
		"Ok: queued as _bXzmsKbSfuMyZzZmB0wLg", "OK id=1tDabc-00000001Xyz-2pQr", "Ok 010001897a5b6c7d-0e1f2a3b", "7f3a1b2c Message accepted for delivery",
		"Mail OK queued as smtp8,DMCow.S2 1453888371", "<a@b> [InternalId=137, Hostname=h] Queued mail for delivery", "OK: queued on mx1 as 4F1D2",
		"ok 1 qp 2", "x Received OK [y.z]", "ok: Message 1 accepted", "OK: queued", "OK  1700000000 d2e1a72fcca58-12345.67 - gsmtp", "Message accepted for delivery = <x@y>.", "queued with id <...", "id id = = a.",
		"first line\nOk: queued as 1",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		id := findQueueID(text)
		if id == "" {
			return
		}
		if !strings.Contains(text, id) {
			t.Errorf("%q is not in %q", id, text)
		}
		if strings.ContainsFunc(id, func(r rune) bool {
			return unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune(`<>"'()[]`, r)
		}) {
			t.Errorf("%q of %q is more than a word", id, text)
		}
		if strings.HasSuffix(id, ".") {
			t.Errorf("%q of %q ends in a dot", id, text)
		}
	})
}
