// What send makes of files, mailboxes and folders, of outcomes, and of a journal; and where relay and password come from.
package main

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/smtptest"
)

func TestMain(m *testing.M) {
	if os.Getenv("SMTPRELAY_TEST_MAIN") != "" { // a process to be killed: see kill_test.go
		main()
	}
	os.Exit(m.Run())
}

// relayFor starts a relay and makes it the one of SMTP_URL.
func relayFor(t *testing.T, set ...func(*smtptest.Server)) *smtptest.Server {
	t.Helper()
	relay := smtptest.New(t, set...)
	t.Setenv("SMTP_URL", relay.URL())
	return relay
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func eml(to, subject string) string {
	return "From: Shop <shop@example.com>\nTo: " + to + "\nSubject: " + subject + "\n\nHello.\n"
}

// subjects are those of what the relay has, with sender and recipients, in order.
func subjects(relay *smtptest.Server) []string {
	var list []string
	for _, m := range relay.Messages() {
		_, rest, _ := strings.Cut(string(m.Body), "Subject: ")
		subject, _, _ := strings.Cut(rest, "\r\n")
		list = append(list, fmt.Sprintf("%s %s>%s", subject, m.From, strings.Join(m.To, ",")))
	}
	slices.Sort(list)
	return list
}

func same(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func TestSendTakesFilesFoldersMaildirsMboxesAndStdin(t *testing.T) {
	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "one"), eml("ann@example.org", "file"))
	write(t, filepath.Join(dir, "folder", "b.eml"), eml("ann@example.org", "folder b"))
	write(t, filepath.Join(dir, "folder", "a.EML"), eml("ann@example.org", "folder a"))
	write(t, filepath.Join(dir, "folder", "readme.txt"), "no mail")
	write(t, filepath.Join(dir, "maildir", "cur", "1.a:2,S"), eml("ann@example.org", "maildir cur"))
	write(t, filepath.Join(dir, "maildir", "new", "2.b"), eml("ann@example.org", "maildir new"))
	write(t, filepath.Join(dir, "maildir", "tmp", "3.c"), eml("ann@example.org", "maildir tmp"))
	mbox := write(t, filepath.Join(dir, "mbox"), "From a Mon Jan  1 00:00:00 2024\n"+eml("ann@example.org", "mbox 1")+">From the first line\n>>From quoted\nnot From this\n\n"+
		"From b Mon Jan  1 00:00:00 2024\n"+eml("ann@example.org", "mbox 2")+"\n")
	relay := relayFor(t)
	code, out, errs := command(t, eml("ann@example.org", "stdin"), "smtprelay", "send", file, filepath.Join(dir, "folder"), filepath.Join(dir, "maildir"), mbox, "-")
	if code != 0 || out != "Messages: 8 accepted.\n" || errs != "" {
		t.Errorf("exit status %d, %q %q", code, out, errs)
	}
	const envelope = " shop@example.com>ann@example.org"
	same(t, subjects(relay), "file"+envelope, "folder a"+envelope, "folder b"+envelope, "maildir cur"+envelope, "maildir new"+envelope, "mbox 1"+envelope, "mbox 2"+envelope, "stdin"+envelope)
	for _, m := range relay.Messages() {
		if strings.Contains(string(m.Body), "mbox 1") && !strings.HasSuffix(string(m.Body), "\r\n\r\nHello.\r\nFrom the first line\r\n>From quoted\r\nnot From this\r\n") {
			t.Errorf("mbox 1 has become %q", m.Body)
		}
	}
}

func TestEnvelopeIsOfTheHeaderOrOfFlagsAndBccIsNeverSent(t *testing.T) {
	text := "Sender: office@example.com\nFrom: boss@example.com\nTo: Ann <ann@example.org>,\n  Bob <bob@example.org>\nCc: ann@example.org\n" +
		"BCC: eve@example.org,\n dan@example.org\nSubject: x\nResent-Bcc: zoe@example.org\n\nBcc: this is text\n"
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"header": {nil, "x office@example.com>ann@example.org,bob@example.org,eve@example.org,dan@example.org,zoe@example.org"},
		"flags":  {[]string{"--from", "a@example.com", "--to", "b@example.org, c@example.org", "--to", "d@example.org"}, "x a@example.com>b@example.org,c@example.org,d@example.org"},
	} {
		t.Run(name, func(t *testing.T) {
			relay := relayFor(t)
			code, _, errs := command(t, text, append(append([]string{"smtprelay", "send"}, c.args...), "-")...)
			if code != 0 {
				t.Fatal(errs)
			}
			same(t, subjects(relay), c.want)
			body := string(relay.Messages()[0].Body)
			if strings.Contains(body, "eve") || strings.Contains(body, "dan@") || strings.Contains(body, "zoe") || !strings.Contains(body, "\r\n\r\nBcc: this is text\r\n") || !strings.Contains(body, "Cc: ann") {
				t.Errorf("%q", body)
			}
		})
	}
}

func TestWhatCannotBeReadIsNamedAndTheRestIsSent(t *testing.T) {
	dir := t.TempDir()
	relay := relayFor(t)
	good := write(t, filepath.Join(dir, "good"), eml("ann@example.org", "good"))
	code, out, errs := command(t, "", "smtprelay", "send",
		filepath.Join(dir, "missing"),
		write(t, filepath.Join(dir, "text"), "this is no mail\n"),
		write(t, filepath.Join(dir, "empty"), ""),
		write(t, filepath.Join(dir, "endless"), "From: "+strings.Repeat("a", 2*mostHeader)),
		write(t, filepath.Join(dir, "nobody"), "From: a@example.com\n\nx\n"),
		write(t, filepath.Join(dir, "nosender"), "To: a@example.com\n\nx\n"),
		write(t, filepath.Join(dir, "cr"), "From: a@example.com\rBcc: eve@example.org\nTo: b@example.org\n\nx\n"),
		filepath.Dir(write(t, filepath.Join(dir, "sub", "x.txt"), "")),
		good)
	if code != exitUsage || out != "Messages: 1 accepted, 8 cannot be read.\n" || len(relay.Messages()) != 1 {
		t.Errorf("exit status %d, %q", code, out)
	}
	for _, want := range []string{"missing: no such file or directory", `text: line 1 is no field of a header: "this is no mail"`, "empty: there is no header", "endless: the header is longer", "cr: line 1 of the header has a carriage return",
		"nobody: there is no recipient", "nosender: there is no sender", "sub: there is no .eml in it"} {
		if !strings.Contains(errs, want) {
			t.Errorf("no %q in\n%s", want, errs)
		}
	}
}

func TestExitStatusSaysWhatBecameOfTheMessages(t *testing.T) {
	for name, c := range map[string]struct {
		fault smtptest.Fault
		exit  int
		out   string
	}{
		"refused": {smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"}, exitSomeRefused, "Messages: 1 refused.\n"},
		"for now": {smtptest.Fault{At: smtptest.FinalDot, Reply: "451 4.3.0 later"}, exitSomeLeft, "Messages: 1 not sent yet.\nWithout --journal the same command would send everything again.\n"},
		"unknown": {smtptest.Fault{At: smtptest.Accepted, Drop: true}, exitSomeUnknown, "Messages: 1 unknown.\n\n" +
			"Unknown (the relay may have them; --resend-unknown sends them again, and some may arrive twice):\n  stdin: to ann@example.org\n"},
	} {
		t.Run(name, func(t *testing.T) {
			relayFor(t).Fault(c.fault)
			code, out, _ := command(t, eml("ann@example.org", "x"), "smtprelay", "send", "-")
			if code != c.exit || out != c.out {
				t.Errorf("exit status %d, want %d; %q", code, c.exit, out)
			}
		})
	}
}

func TestJournalSendsTheRestAndNothingTwice(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"ann", "bob", "full", "gone", "lost"} {
		write(t, filepath.Join(dir, "mails", name+".eml"), eml(name+"@example.org", name))
	}
	write(t, filepath.Join(dir, "mails", "some.eml"), eml("dan@example.org, full@example.org, gone@example.org", "some"))
	// Two that are the same are two messages.
	write(t, filepath.Join(dir, "mails", "twin1.eml"), eml("twin@example.org", "twin"))
	write(t, filepath.Join(dir, "mails", "twin2.eml"), eml("twin@example.org", "twin"))
	relay := relayFor(t, func(s *smtptest.Server) { s.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user"} })
	full := relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "full@example.org", Reply: "452 4.2.2 mailbox full", Count: -1})
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "twin@example.org", Reply: "452 4.2.2 not now"}) // one of the two
	relay.Fault(smtptest.Fault{At: smtptest.Accepted, When: func(e smtptest.Event) bool { return slices.Contains(e.To, "lost@example.org") }, Drop: true, Count: 1})
	journal := filepath.Join(dir, "journal")
	send := func(want int, wantOut string, flags ...string) {
		t.Helper()
		// One connection, so that the loss of one message leaves no other unknown.
		args := append([]string{"smtprelay", "send", "--journal", journal, "--conns", "1"}, flags...)
		code, out, errs := command(t, "", append(args, filepath.Join(dir, "mails"))...)
		if code != want || !strings.HasPrefix(out, wantOut) {
			t.Errorf("exit status %d, want %d\n%s%s", code, want, out, errs)
		}
	}
	const lost = "lost shop@example.com>lost@example.org"
	first := []string{"ann shop@example.com>ann@example.org", "bob shop@example.com>bob@example.org", lost, "some shop@example.com>dan@example.org", "twin shop@example.com>twin@example.org"}
	send(exitSomeUnknown, "Messages: 3 accepted, 1 refused, 3 not sent yet, 1 unknown.\n")
	same(t, subjects(relay), first...)

	full.Remove()
	send(exitSomeUnknown, "Messages: 3 accepted, 1 unknown, 3 accepted in earlier runs, 1 refused in earlier runs.\n")
	same(t, subjects(relay), []string{first[0], first[1], "full shop@example.com>full@example.org", lost, first[3], "some shop@example.com>full@example.org", first[4], first[4]}...)

	n := len(relay.Messages())
	send(exitSomeUnknown, "Messages: 1 unknown, 5 accepted in earlier runs, 2 refused in earlier runs.\n")
	if len(relay.Messages()) != n {
		t.Error("a third run has sent something")
	}
	send(exitSomeRefused, "Messages: 1 accepted, 5 accepted in earlier runs, 2 refused in earlier runs.\n", "--resend-unknown")
	send(exitSomeRefused, "Messages: 2 refused, 6 accepted in earlier runs.\n", "--retry-refused")
	if len(relay.Messages()) != n+1 {
		t.Errorf("%d messages, want %d", len(relay.Messages()), n+1)
	}
}

func TestIntentIsInTheJournalBeforeTheEndOfAMessageHasLeft(t *testing.T) {
	for _, chunking := range []bool{false, true} {
		t.Run(fmt.Sprint("chunking=", chunking), func(t *testing.T) {
			dir := t.TempDir()
			journal := filepath.Join(dir, "journal")
			for i := range 20 {
				write(t, filepath.Join(dir, "mails", fmt.Sprint(i, ".eml")), eml(fmt.Sprintf("user%d@example.org", i), "x"))
			}
			relay := relayFor(t, func(s *smtptest.Server) { s.Chunking = chunking })
			if chunking {
				t.Setenv("SMTP_URL", with(t, relay.URL(), func(_ *url.URL, q url.Values) { q.Set("chunking", "on") }))
			}
			missing := make(chan string, 100)
			relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Count: -1, When: func(e smtptest.Event) bool {
				text, _ := os.ReadFile(journal)
				if !strings.Contains(string(text), fmt.Sprintf(`"intent":[%q]`, e.To[0])) {
					missing <- e.To[0]
				}
				return false
			}})
			if code, _, errs := command(t, "", "smtprelay", "send", "--journal", journal, filepath.Join(dir, "mails")); code != 0 || len(relay.Messages()) != 20 {
				t.Error(code, errs)
			}
			if len(missing) > 0 {
				t.Errorf("no intent for %s and %d more", <-missing, len(missing))
			}
		})
	}
}

func TestJournalThatIsTornAtItsEndIsMendedAndAnythingElseIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	const whole = `{"mail":"a-1","intent":["x@example.org"]}` + "\n" + `{"mail":"a-1","result":{"x@example.org":"accepted"}}` + "\n"
	write(t, path, whole+`{"mail":"b-1","intent":["y@example.org","and","more","than","the","next","record","has"`)
	j, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	if j.known["a-1"]["x@example.org"] != fateAccepted || j.known["b-1"] != nil {
		t.Errorf("%v", j.known)
	}
	if _, err := openJournal(path); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second run has opened it: %v", err)
	}
	if err := j.intent(&mail{key: "c-1"}, []string{"z@example.org"}); err != nil {
		t.Fatal(err)
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	text, _ := os.ReadFile(path)
	if want := whole + `{"mail":"c-1","intent":["z@example.org"]}` + "\n"; string(text) != want {
		t.Errorf("got %q, want %q", text, want)
	}
	write(t, path, "Dear diary\n"+whole)
	if _, err := openJournal(path); err == nil || !strings.Contains(err.Error(), "line 1 is no record") {
		t.Error(err)
	}
}

func TestFileThatChangesWhileItIsSentIsNotAccepted(t *testing.T) {
	relay := relayFor(t)
	path := write(t, filepath.Join(t.TempDir(), "m.eml"), eml("ann@example.org", "x"))
	relay.Fault(smtptest.Fault{At: smtptest.Mail, When: func(smtptest.Event) bool {
		f, _ := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		_, _ = f.WriteString("more\n")
		f.Close()
		return false
	}, Count: -1})
	code, _, errs := command(t, "", "smtprelay", "send", path)
	if code != exitSomeLeft || len(relay.Messages()) != 0 || !strings.Contains(errs, "has changed") {
		t.Errorf("exit status %d, %d messages, %s", code, len(relay.Messages()), errs)
	}
}

func TestDryRunSendsNothingAndNeedsNoRelay(t *testing.T) {
	t.Setenv("SMTP_URL", "")
	code, out, errs := command(t, eml("ann@example.org", "x"), "smtprelay", "send", "--dry-run", "-")
	if code != 0 || out != "stdin: from shop@example.com to ann@example.org\n" {
		t.Error(code, out, errs)
	}
}

func TestJSONHasALineForEachMessage(t *testing.T) {
	relay := relayFor(t)
	code, out, errs := command(t, eml("ann@example.org", "x"), "smtprelay", "send", "--json", "-")
	want := `{"source":"stdin","from":"shop@example.com","result":{"ann@example.org":"accepted"},"queue_id":"` + relay.Messages()[0].ID + `"}` + "\n"
	if code != 0 || out != want || errs != "Messages: 1 accepted.\n" {
		t.Error(code, out, errs)
	}
}

func TestRelayAndPasswordComeFromFilesAndTheEnvironmentAndNeverFromTheCommandLine(t *testing.T) {
	relay := smtptest.New(t)
	dir := t.TempDir()
	t.Chdir(dir)
	noPassword := with(t, relay.URL(), func(u *url.URL, _ url.Values) { u.User = url.User(u.User.Username()) })
	urlFile := write(t, "url", relay.URL()+"\n")
	passwordFile := write(t, "password", relay.Password+"\n")
	for name, c := range map[string]struct {
		env  map[string]string
		file string // .env
		args []string
		exit int
		errs string
	}{
		"environment":            {env: map[string]string{"SMTP_URL": relay.URL()}},
		".env":                   {file: "SMTP_URL='" + relay.URL() + "'\n"},
		"environment and .env":   {env: map[string]string{"SMTP_URL": relay.URL()}, file: "SMTP_URL=smtp://nowhere.invalid\n"},
		"file":                   {args: []string{"--relay-file", urlFile}},
		"flag and password file": {args: []string{"--relay", noPassword, "--password-file", passwordFile}},
		"flag and environment":   {env: map[string]string{"SMTP_PASSWORD": relay.Password}, args: []string{"--relay", noPassword}},
		"flag and .env":          {file: "SMTP_PASSWORD=" + relay.Password + "\n", args: []string{"--relay", noPassword}},
		"password in the flag":   {args: []string{"--relay", relay.URL()}, exit: exitUsage, errs: "smtprelay: --relay has a password, and other users of this machine see the command line"},
		"broken flag":            {args: []string{"--relay", "smtp://u:%zz" + relay.Password + "@h"}, exit: exitUsage, errs: "--relay cannot be parsed as a URL"},
		"nothing":                {exit: exitUsage, errs: "smtprelay: no relay is set: put its URL, such as smtps://USER:PASSWORD@HOST:465, into SMTP_URL (in the environment or in .env) or a file (--relay-file)"},
		"broken .env":            {file: "SMTP_URL='" + relay.URL() + "\n", exit: exitUsage, errs: "smtprelay: .env cannot be read"},
		"no such file":           {args: []string{"--relay-file", "none"}, exit: exitUsage, errs: "no such file"},
		"no password":            {args: []string{"--relay", noPassword}, exit: exitUsage, errs: "a user and no password: put the password into SMTP_PASSWORD or a file (--password-file)"},
		"both":                   {args: []string{"--relay-file", urlFile, "--relay", noPassword}, exit: exitUsage, errs: "one of them"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("SMTP_URL", "")
			t.Setenv("SMTP_PASSWORD", "")
			for k, v := range c.env {
				t.Setenv(k, v)
			}
			os.Remove(".env")
			if c.file != "" {
				write(t, ".env", c.file)
			}
			code, out, errs := command(t, eml("ann@example.org", "x"), append(append([]string{"smtprelay", "send"}, c.args...), "-")...)
			if code != c.exit || !strings.Contains(errs, c.errs) {
				t.Errorf("exit status %d: %s%s", code, out, errs)
			}
			if strings.Contains(out+errs, relay.Password) {
				t.Error("the password is in the output")
			}
		})
	}
}

func TestRelayThatCannotBeReachedIsToldOnce(t *testing.T) {
	t.Setenv("SMTP_URL", "smtp+insecure://127.0.0.1:"+unusedPort(t)+"?max_attempts=1")
	code, out, errs := command(t, eml("ann@example.org", "x"), "smtprelay", "send", "-")
	if code != exitSomeLeft || out != "" || !strings.Contains(errs, "nothing was sent") || !strings.Contains(errs, "smtprelay check") {
		t.Error(code, out, errs)
	}
}

// Whatever a message looks like, no line of what is sent before the text is a Bcc, by whichever line ends a relay reads it.
func FuzzBccIsNeverSent(f *testing.F) {
	for _, text := range []string{
		eml("ann@example.org", "x"), "From: a@b.test\r\nBcc: c@d.test,\r\n e@f.test\r\nTo: g@h.test\r\n\r\nBcc: text\r\n",
		"From: a@b.test\rBcc: c@d.test\nTo: g@h.test\n\n", "Bcc: c@d.test\n\nx", "From: a@b.test\nTo: g@h.test\nbCC: x@y.test", " Bcc: c@d.test\nFrom: a@b.test\n\n",
	} {
		f.Add(text, false)
		f.Add(text, true)
	}
	f.Fuzz(func(t *testing.T, text string, sendmail bool) {
		if sendmail {
			text = string(new(sendmailFlags).complete([]byte(text), "cron@example.com"))
		}
		m := inMemory("fuzz", []byte(text))
		if m.err() != nil || m.seal(envelope{from: "a@example.com", to: []string{"b@example.org"}}) != nil {
			return
		}
		for _, line := range strings.FieldsFunc(string(m.header), func(r rune) bool { return r == '\r' || r == '\n' }) {
			if len(line) > 4 && strings.EqualFold(line[:4], "Bcc:") {
				t.Errorf("sent: %q of %q", line, text)
			}
		}
		var sent strings.Builder
		if _, err := (&body{m, func() error { return nil }}).WriteTo(&sent); err != nil {
			t.Error(err)
		}
		if !strings.HasPrefix(sent.String(), string(m.header)) {
			t.Errorf("%q is not sent after its header", text)
		}
	})
}
