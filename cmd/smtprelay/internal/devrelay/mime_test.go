// What is in a message, and messages that are made to hurt who reads them.
package devrelay

import (
	"encoding/base64"
	"fmt"
	"runtime"
	"strings"
	"testing"
)

func TestPartsAreFoundAndDecoded(t *testing.T) {
	body := []byte("From: =?utf-8?q?J=C3=BCrgen?= <j@example.com>\r\nSubject: =?iso-8859-1?Q?=FCber?=\r\n =?utf-8?B?IPCfmIA=?=\r\nContent-Type: multipart/mixed; boundary=m\r\n\r\npreamble\r\n" +
		"--m\r\nContent-Type: multipart/alternative; boundary=\"a b\"\r\n\r\n" +
		"--a b\r\nContent-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nGr=FC=DFe\r\n" +
		"--a b\r\nContent-Type: text/html; charset=utf-16le\r\nContent-Transfer-Encoding: base64\r\n\r\nPABiAD4A\r\n--a b--\r\n" +
		"--m\r\nContent-Type: application/octet-stream; name=\"x.bin\"\r\nContent-Transfer-Encoding: base64\r\n\r\nAAEC\r\n" +
		"--m\r\nContent-Type: text/plain\r\nContent-Disposition: attachment; filename=\"=?utf-8?q?n=C3=B6te.txt?=\"\r\n\r\nnote\r\n" +
		"--m\r\n\r\nmore text\r\n--m--\r\nepilogue\r\n")
	p := parse(body, maxShown)
	if p.Problem != "" || p.get("from") != "Jürgen <j@example.com>" || p.get("Subject") != "über 😀" || p.Text != "Grüßemore text" || p.HTML != "<b>" {
		t.Errorf("%+v", p)
	}
	if got := fmt.Sprintf("%+v", p.Attachments); got != "[{Part:3 Name:x.bin Type:application/octet-stream Size:3 ContentID:} {Part:4 Name:nöte.txt Type:text/plain Size:4 ContentID:}]" {
		t.Error(got)
	}
	if octets, name, found := part(body, 3); string(octets) != "\x00\x01\x02" || name != "x.bin" || !found {
		t.Errorf("part 3: %q %q %v", octets, name, found)
	}
	if _, _, found := part(body, 0); found {
		t.Error("the message is not a part of itself")
	}
}

func TestABrokenPartDoesNotHideTheOthers(t *testing.T) {
	body := []byte("Content-Type: multipart/mixed; boundary=m\r\n\r\n--m\r\nContent-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\n!!!!\r\n" +
		"--m\r\nContent-Type: text/plain; charset=klingon\r\n\r\nwhat\r\n--m\r\nContent-Type: text/plain\r\n\r\nhello\r\n--m--\r\n")
	p := parse(body, maxShown)
	if !strings.Contains(p.Text, "hello") || len(p.Attachments) != 1 || !strings.Contains(p.Problem, "part 1") {
		t.Errorf("%+v", p)
	}
	for _, body := range []string{"", "x", "no header\r\n\r\nx", "\r\n\r\ntext", "A: b", ": x\r\n\r\n", "Content-Type: multipart/mixed\r\n\r\n--\r\n", "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b"} {
		parse([]byte(body), maxShown) // must not panic, whatever it finds
		withImages(`<img src="cid:x">`, []byte(body))
		part([]byte(body), 1)
	}
}

func FuzzParse(f *testing.F) {
	for _, a := range attacks("evil.example") {
		f.Add([]byte(a.mail()))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		p := parse(body, 1000)
		for _, a := range p.Attachments {
			octets, name, found := part(body, a.Part)
			if !found || name != a.Name || name == "" || strings.ContainsAny(name, "/\\\r\n\"") {
				t.Fatalf("part %d: found %v, name %q, %d octets", a.Part, found, name, len(octets))
			}
		}
	})
}

func TestBombsAreNotReadToTheEnd(t *testing.T) {
	deep := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n", i, i)
		}
		return b.String() + "Content-Type: text/plain\r\n\r\nhello\r\n"
	}
	for name, c := range map[string]struct{ body, problem string }{
		"multiparts in each other":      {deep(5000), errDepth.Error()},
		"many parts":                    {"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + strings.Repeat("--b\r\n\r\n", 500_000), errParts.Error()},
		"a long header":                 {"Subject: " + strings.Repeat("x", 5<<20) + "\r\n\r\n", "header exceeds"},
		"many fields":                   {strings.Repeat("a:\r\n", 2<<20) + "\r\n", "header exceeds"},
		"a long header of a part":       {"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n" + strings.Repeat("a:\r\n", 2<<20) + "\r\n", errBig.Error()},
		"a header of a part of a part":  {deep(5)[:len(deep(5))-len("Content-Type: text/plain\r\n\r\nhello\r\n")] + strings.Repeat("a:\r\n", 2<<20), errBig.Error()},
		"a text of which part is shown": {"Content-Type: text/plain\r\n\r\n" + strings.Repeat("hello ", 2<<20), ""},
		"an encoded text":               {"Content-Type: text/html\r\nContent-Transfer-Encoding: base64\r\n\r\n" + base64.StdEncoding.EncodeToString(make([]byte, 8<<20)), ""},
		"a charset that grows":          {"Content-Type: text/plain; charset=iso-8859-1\r\n\r\n" + strings.Repeat("\xff", 8<<20), ""},
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			p := parse([]byte(c.body), maxShown)
			runtime.ReadMemStats(&after)
			if (c.problem == "") != (p.Problem == "") || !strings.Contains(p.Problem, c.problem) {
				t.Errorf("problem %q, want %q", p.Problem, c.problem)
			}
			if len(p.Text) > 2*maxShown || len(p.HTML) > 2*maxShown || len(p.Attachments) > maxParts {
				t.Errorf("%d octets of text, %d of HTML, %d attachments", len(p.Text), len(p.HTML), len(p.Attachments))
			}
			if used := after.TotalAlloc - before.TotalAlloc; used > uint64(len(c.body))+(64<<20) {
				t.Errorf("%d octets were allocated for a message of %d", used, len(c.body))
			}
		})
	}
}

func TestNamesOfAttachmentsAreFitForFiles(t *testing.T) {
	for disposition, want := range map[string]string{
		`attachment; filename="a b.pdf"`:                                 "a b.pdf",
		`attachment; filename="../../etc/passwd"`:                        "passwd",
		`attachment; filename="C:\\dir\\x.exe"`:                          "x.exe",
		`attachment; filename*=utf-8''a%0d%0aX-Evil%3A%201`:              "aX-Evil 1",
		`attachment; filename*=utf-8''fdp%E2%80%AEexe.pdf%00`:            "fdpexe.pdf",
		`attachment; filename="..."`:                                     "part-1",
		`attachment; filename=""`:                                        "part-1",
		`attachment`:                                                     "part-1",
		`attachment; filename="` + strings.Repeat("ö", 300) + `"`:        strings.Repeat("ö", 60),
		`attachment; filename*=utf-8''%3Cimg%20src%3Dx%20onerror%3Dy%3E`: "img src=x onerror=y",
	} {
		_, name, _ := part([]byte("Content-Type: application/pdf\r\nContent-Disposition: "+disposition+"\r\n\r\nx"), 1)
		if name != want {
			t.Errorf("%s: %q, want %q", disposition, name, want)
		}
	}
}
