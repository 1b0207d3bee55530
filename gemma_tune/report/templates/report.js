if (/^zh\b/i.test(navigator.language || "")) document.getElementById("zh").checked = true;
