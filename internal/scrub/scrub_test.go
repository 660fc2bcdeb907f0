// Here belongs what is found of a secret in a reply, and what is not taken for one. That every reply of a session is
// scrubbed is tested in the root package.
package scrub

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"
	"testing"
)

const key = "SG.k3y-with/odd+chars=.and%percent" // of SendGrid's form

func plainOf(user, password string) []byte { return []byte("\x00" + user + "\x00" + password) }

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// streamOf returns a session's Stream that has given user and password away with PLAIN.
func streamOf(user, password string) *Stream {
	s := new(Known).NewStream()
	s.Password(password)
	s.Response("PLAIN", plainOf(user, password))
	return &s
}

func TestSecretIsFoundInEachOfItsForms(t *testing.T) {
	response := b64(string(plainOf("ann", key)))
	for form, echo := range map[string]string{
		"plain":                     key,
		"upper case":                strings.ToUpper(key),
		"lower case":                strings.ToLower(key),
		"its first half":            key[:17],
		"its second half":           key[17:],
		"from its middle":           key[9:21],
		"over two lines":            key[:10] + "\n" + key[10:],
		"over many lines":           strings.Join(strings.Split(key, ""), "\n"),
		"with blanks between":       strings.Join(strings.Split(key, ""), " "),
		"with what has no width":    strings.Join(strings.Split(key, ""), "\u200b"),
		"with what is no UTF-8":     strings.Join(strings.Split(key, ""), "\xff"),
		"the same, as it is shown":  strings.Join(strings.Split(key, ""), "\uFFFD"),
		"with marks on the letters": strings.Join(strings.Split(key, ""), "\u0301"),
		"base64":                    b64(key),
		"base64, unpadded":          strings.TrimRight(b64(key), "="),
		"base64 for URLs":           base64.URLEncoding.EncodeToString([]byte(key)),
		"base64 after one octet":    strings.TrimRight(b64("x"+key), "Q=")[2:], // whose last character is of what follows too
		"base64 after two octets":   b64("xy" + key)[3:],
		"base64 in lower case":      strings.ToLower(b64(key)),
		"the response":              response,
		"a part of the response":    response[:40],
		"the end of the response":   response[len(response)-13:],
		"the response, folded":      response[:11] + "\n" + response[11:22] + "\n" + response[22:],
		"hex":                       hex.EncodeToString([]byte(key)),
		"hex in upper case":         strings.ToUpper(hex.EncodeToString([]byte(key))),
		"escaped in a path":         url.PathEscape(key),
		"escaped in a query":        url.QueryEscape(key),
		"escaped throughout":        percent(key),
	} {
		got := streamOf("ann", key).Scrub("I know " + echo + " of yours")
		got = strings.TrimRight(strings.TrimSuffix(got, " of yours"), "=")
		if got != "I know "+Redacted && got != "I know"+Redacted {
			t.Errorf("%s: got %q of %q", form, got, echo)
		}
	}
}

func TestShortSecretIsFoundAsAWhole(t *testing.T) {
	for _, tt := range []struct{ password, text, want string }{
		{"k3y!", "no k3y! here", "no [redacted] here"},
		{"k3y!", "no K3Y! here", "no [redacted] here"},
		{"k3y!", "no k3\ny! here", "no [redacted] here"},
		{"k3y!", "no k3 y! here", "no k3 y! here"},
		{"k3y!", "no k3y here", "no k3y here"},
		{"k3y!", "no azN5IQ== here", "no [redacted] here"},
		{"k3y!", "no 6b337921 here", "no [redacted] here"},
		{"k3y!", "no k3y%21 here", "no [redacted] here"},
		{"k y!", "no k y! here", "no k y! here"}, // three characters
		{"k 3y!", "no k 3y! here", "no [redacted] here"},
		{"k3y", "no k3y here", "no k3y here"},
		{"hunter22", "no hun ter22 here", "no [redacted] here"},
		{"hunter22", "no hunter2 here", "no hunter2 here"},
	} {
		s := new(Known).NewStream()
		s.Password(tt.password)
		if got := s.Scrub(tt.text); got != tt.want {
			t.Errorf("password %q: got %q, want %q", tt.password, got, tt.want)
		}
	}
}

func TestSecretIsFoundAcrossReplies(t *testing.T) {
	s := streamOf("ann", key)
	var said []string
	for _, part := range []string{key[:11], key[11:15], key[15:16], key[16:]} {
		said = append(said, s.Scrub(part))
	}
	if got, want := strings.Join(said, "|"), key[:11]+"|[redacted]|[redacted]|[redacted]"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestWordsThatAreNoSecretStay(t *testing.T) {
	long := "newsletter@mail.shop.example"
	for _, tt := range []struct {
		why       string
		mechanism string
		response  string
		text      string
	}{
		{"the word user, a user's name", "PLAIN", "\x00user\x00" + key, "Invalid username or password"},
		{"a long user name", "PLAIN", "\x00" + long + "\x00" + key, "no such user: " + long},
		{"the one who is acted for", "PLAIN", long + "\x00ann\x00" + key, "no such user: " + long},
		{"of XOAUTH2", "XOAUTH2", "user=" + long + "\x01auth=Bearer " + key + "\x01\x01", "user=" + long + " auth=Bearer"},
		{"of OAUTHBEARER", "OAUTHBEARER", "n,a=" + long + ",\x01host=smtp.shop.example\x01port=587\x01auth=Bearer " + key + "\x01\x01", "smtp.shop.example: no " + long},
		{"of SCRAM", "SCRAM-SHA-256", "n,,n=" + long + ",r=fyko+d2lbbFgONRv9qkxdawL", "no such user: " + long},
		{"of CRAM-MD5", "CRAM-MD5", long + " b913a602c7eda7a495b4e6e7334d3890", "no such user: " + long},
		{"eleven of its characters", "PLAIN", "\x00ann\x00" + key, "got " + key[:11] + ", " + key[20:31]},
	} {
		s := new(Known).NewStream()
		s.Response(tt.mechanism, []byte(tt.response))
		if got := s.Scrub(tt.text); got != tt.text {
			t.Errorf("%s: got %q, want %q", tt.why, got, tt.text)
		}
	}
	// Unless it is the password.
	if got := streamOf(key, key).Scrub("no such user: " + key); strings.Contains(got, key) {
		t.Errorf("user name and password: got %q", got)
	}
}

func TestTokenIsFoundWhateverTheMechanism(t *testing.T) {
	for mechanism, response := range map[string]string{
		"XOAUTH2":     "user=ann\x01auth=Bearer " + key + "\x01\x01",
		"OAUTHBEARER": "n,a=ann,\x01host=x.example\x01auth=bearer " + key + "\x01\x01",
		"LOGIN":       key,
		"EXTERNAL":    key,
		"X-ODD":       "one\x00" + key,
		"CRAM-MD5":    "ann " + key,
	} {
		s := new(Known).NewStream()
		s.Response(mechanism, []byte(response))
		for form, echo := range map[string]string{"plain": key, "base64": strings.TrimRight(b64(key), "="), "response": strings.TrimRight(b64(response), "=")} {
			if got := strings.TrimRight(s.Scrub("[] "+echo), "="); strings.TrimPrefix(got, "[]") != " "+Redacted && got != "[]"+Redacted {
				t.Errorf("%s, %s: got %q", mechanism, form, got)
			}
		}
	}
}

func TestNextSessionKnowsWhatTheLastGaveAway(t *testing.T) {
	var k Known
	if got := k.Scrub(key); got != key {
		t.Errorf("before anything was given: got %q", got)
	}
	k.Expect("an0ther")
	if got := k.Scrub("an0ther"); got != Redacted {
		t.Errorf("what is expected: got %q", got)
	}
	first := k.NewStream()
	first.Password(key)
	first.Scrub("ok")
	next := k.NewStream()
	if got := next.Scrub("hello " + key); got != "hello "+Redacted {
		t.Errorf("the next session: got %q", got)
	}
	if got := k.Scrub(key); got != Redacted {
		t.Errorf("outside of sessions: got %q", got)
	}
	next.Password(key)
	next.Scrub("ok")
	if next.index != first.index {
		t.Error("the index was made twice")
	}
}

func TestStreamDoesNotPrint(t *testing.T) {
	s := streamOf("ann", key)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
		if got := fmt.Sprintf(verb+verb, s, s.known); got != Redacted+Redacted {
			t.Errorf("%s: got %q", verb, got)
		}
	}
}

var usual = []string{"2.0.0 Ok", "2.1.5 Ok", "End data with <CR><LF>.<CR><LF>", "Ok: queued as 0123456789abcdefghijkl"}

func TestCleanReplyAllocatesNothing(t *testing.T) {
	s := streamOf("apikey", strings.Repeat("k3y-", 17))
	for _, text := range usual {
		s.Scrub(text)
		if n := testing.AllocsPerRun(100, func() { s.Scrub(text) }); n != 0 {
			t.Errorf("%q: %v allocations, want none", text, n)
		}
	}
}

func BenchmarkCleanReply(b *testing.B) {
	s := streamOf("apikey", strings.Repeat("k3y-", 17))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.Scrub(usual[i%len(usual)])
	}
}

func BenchmarkIndex(b *testing.B) {
	s := streamOf("apikey", key+key)
	b.ReportAllocs()
	for b.Loop() {
		newIndex(s.given)
	}
}

func BenchmarkHostileReply(b *testing.B) {
	s := streamOf("apikey", key+key)
	text := strings.Repeat(key, 64<<10/len(key))
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		s.Scrub(text)
	}
}

// FuzzScrub has a relay say parts of a secret, cut, folded and spaced as it likes: no twelve characters of it, nor of its
// base64, come through in a row.
func FuzzScrub(f *testing.F) {
	f.Add(key, "ann", []byte("\x05\x00\x0a\x81\x05\x10\xff"), "no ", " here")
	f.Add("hunter22hunter22", "user", []byte("\x00\x03\x07\x80\x01\x90\x20"), "", "")
	f.Add("пароль-Пароль", "ann", []byte("\x22\x33\x44\x55"), "Ж", "\xff")
	f.Fuzz(func(t *testing.T, secret, user string, how []byte, before, behind string) {
		if len(secret) < 4 || strings.ContainsAny(secret, "\x00\x01\r\n") || strings.ContainsAny(user, "\x00") || len(how) == 0 || len(how) > 64 || len(secret) > 1000 {
			return
		}
		next := 0
		take := func() int { next++; return int(how[next%len(how)]) }
		response := string(plainOf(user, secret))
		source := []string{secret, b64(secret), b64(response), b64("x" + secret), b64("xy" + secret)}[take()%5]
		if take()%2 == 0 {
			source = strings.ToUpper(source)
		}
		from := take() % len(source)
		echo := source[from:]
		var replies []string
		reply := before
		for len(echo) > 0 {
			n := min(1+take()%20, len(echo))
			reply += echo[:n]
			echo = echo[n:]
			switch take() % 5 {
			case 0:
				reply += "\n"
			case 1:
				reply += " "
			case 2:
				replies, reply = append(replies, reply), ""
			}
		}
		replies = append(replies, reply+behind)

		s := new(Known).NewStream()
		s.Name(user)
		s.Password(secret)
		s.Response("PLAIN", []byte(response))
		var shown strings.Builder
		for _, r := range replies {
			shown.WriteString(s.Scrub(r))
			shown.WriteByte('\n')
		}
		// "[redacted]" keeps what stands around it apart; it is no secret that is shown.
		got := string(appendNormal(nil, strings.ReplaceAll(shown.String(), Redacted, "\u2612")))
		for _, form := range []string{secret, b64(secret), b64(response)} {
			norm := strings.TrimRight(string(appendNormal(nil, form)), "=")
			for i := 0; i+gramLen <= len(norm); i++ {
				if run := norm[i : i+gramLen]; strings.Contains(got, run) && !strings.Contains(Redacted, run) {
					t.Fatalf("%q of %q is in %q", run, form, shown.String())
				}
			}
		}
	})
}
